"""Names and their signatures: a function's keyword-only parameters are the schema of the option that names it."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from mlmx.config.errors import did_you_mean, require
from mlmx.config.plugins import load, plugins

F = TypeVar("F", bound=Callable[..., Any])
Function = Callable[..., Any]


def table(*functions: F) -> dict[str, F]:
    """``{function name: function}``: what a group's ``name:`` is looked up in."""
    return {function.__name__: function for function in functions}


def bind(
    group: str, options: Mapping[str, Any], functions: Mapping[str, F], *shared: Callable[..., Any]
) -> tuple[functools.partial[Any], ...]:
    """Check a group's options against the signature of the function it names.

    Keyword-only parameters are options; the other parameters are handed over by the pipeline. Options of
    the ``shared`` functions (the split of every dataset, say) stand in the same group.

    >>> def scratch(tokenizer, *, layers: int, dropout: float = 0.1): ...
    >>> part, = bind("model", {"name": "scratch", "layers": 2}, table(scratch))
    >>> part.func.__name__, part.keywords
    ('scratch', {'layers': 2})

    Returns:
        The named function and each shared one, with their options filled in.
    Raises:
        RequestError: unknown name or option (with the nearest right one), wrong type, missing option.
    """
    name = options.get("name")
    require(isinstance(name, str) and bool(name), f"{group}.name: missing; one of {', '.join(functions)}")
    function = functions.get(str(name)) or _plugin(group, str(name), functions)
    targets: list[Function] = [function, *shared]
    accepted = {key: parameter for target in targets for key, parameter in _options_of(target).items()}
    filled: list[dict[str, Any]] = [{} for _ in targets]
    for key, value in options.items():
        if key == "name":
            continue
        require(
            key in accepted,
            f"{group}.{key}: unknown option{did_you_mean(str(key), accepted)} "
            f"({group} '{name}' takes {', '.join(accepted) or 'no options'})",
        )
        for target, keywords in zip(targets, filled, strict=True):
            parameter = _options_of(target).get(key)
            if parameter is not None:
                keywords[key] = convert(f"{group}.{key}", value, _annotation(target, parameter))
    for key, parameter in accepted.items():
        require(
            key in options or parameter.default is not inspect.Parameter.empty,
            f"{group}.{key}: missing; {group} '{name}' needs it: {group}.{key}=…",
        )
    return tuple(functools.partial(target, **kw) for target, kw in zip(targets, filled, strict=True))


def _plugin(group: str, name: str, functions: Mapping[str, F]) -> F:
    """A user's own function; that of ``heldout.dataset`` is a dataset's."""
    stage = group.rpartition(".")[2]
    known = [*functions, *plugins(stage)]
    require(name in known, f"{group}.name={name}: unknown{did_you_mean(name, known)} (known: {', '.join(known)})")
    return typing.cast(F, load(stage, name))


def _options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The parameter's type, evaluated alone: other annotations may name types imported lazily."""
    if isinstance(parameter.annotation, str):
        return eval(parameter.annotation, function.__globals__)
    return parameter.annotation


def convert(key: str, value: Any, wanted: Any) -> Any:
    """``value`` as type ``wanted``, or a `RequestError` that says what is needed.

    >>> convert("lr", 1, float), convert("seed", 42.0, int), convert("path", ["a", "b"], str | list[str])
    (1.0, 42, ['a', 'b'])
    """
    converted = _converted(value, wanted)
    require(converted is not _NO, f"{key}={value!r}: {_wording(wanted)} is needed")
    return converted


_NO = object()


def _converted(value: Any, wanted: Any) -> Any:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any or wanted is inspect.Parameter.empty:
        return value
    if origin is Literal:
        return value if value in arguments else _NO
    if origin in (typing.Union, types.UnionType):
        exact = [a for a in arguments if isinstance(a, type) and type(value) is a]
        tried = [_converted(value, a) for a in [*exact, *arguments]]
        return next((t for t in tried if t is not _NO), _NO)
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        items = [_converted(item, arguments[0] if arguments else Any) for item in value]
        return _NO if any(item is _NO for item in items) else items
    if origin is dict and isinstance(value, Mapping):
        items_of = {k: _converted(v, arguments[1]) for k, v in value.items()}
        return _NO if any(v is _NO for v in items_of.values()) else items_of
    return _scalar(value, wanted)


def _scalar(value: Any, wanted: Any) -> Any:
    if wanted in (None, type(None)):
        return value if value is None else _NO
    if not isinstance(wanted, type):
        return _NO
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is float and number:
        return float(value) if isinstance(value, float) or abs(value) < 2**1023 else _NO
    if wanted is int and number:
        return int(value) if isinstance(value, int) or value.is_integer() else _NO
    if wanted is str and (number or isinstance(value, bool)):
        return str(value)
    return value if isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool)) else _NO


_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def _wording(wanted: Any) -> str:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_wording(a) for a in arguments)
    if origin is list:
        return "a list"
    if origin is dict:
        return "a mapping"
    return _WORDS.get(wanted, getattr(wanted, "__name__", str(wanted)))
