"""Names and their signatures: a function's keyword-only parameters are the schema of the option that names it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mlmx.config.errors import RequestError, did_you_mean, require
from mlmx.config.plugins import load, plugins

F = TypeVar("F", bound=Callable[..., Any])


def table(*functions: F) -> dict[str, F]:
    """``{function name: function}``: what a group's ``name:`` is looked up in."""
    return {function.__name__: function for function in functions}


def bind(
    group: str, options: Mapping[str, Any], functions: Mapping[str, F], *shared: Callable[..., Any]
) -> tuple[functools.partial[Any], ...]:
    """A group's named function and each ``shared`` one, with their options filled in and checked by their signatures.

    Keyword-only parameters are options; the other parameters are handed over by the pipeline. Options of
    the ``shared`` functions (the split of every dataset, say) stand in the same group.

    >>> def scratch(tokenizer, *, layers: int, dropout: float = 0.1): ...
    >>> part, = bind("model", {"name": "scratch", "layers": 2}, table(scratch))
    >>> part.func.__name__, part.keywords
    ('scratch', {'layers': 2})
    """
    name = options.get("name")
    require(isinstance(name, str) and bool(name), f"{group}.name: missing; one of {', '.join(functions)}")
    named: Callable[..., Any] | None = functions.get(str(name))
    if named is None:
        stage = group.rpartition(".")[2]  # that of ``heldout.dataset`` is a dataset's
        known = [*functions, *plugins(stage)]
        near = did_you_mean(str(name), known)
        require(name in known, f"{group}.name={name}: unknown{near} (known: {', '.join(known)})")
        named = load(stage, str(name))
    targets = [named, *shared]
    accepted = {key: option for target in targets for key, option in _options_of(target).items()}
    filled: list[dict[str, Any]] = [{} for _ in targets]
    for key, value in options.items():
        if key == "name":
            continue
        takes = f"{group} '{name}' takes {', '.join(accepted) or 'no options'}"
        require(key in accepted, f"{group}.{key}: unknown option{did_you_mean(str(key), accepted)} ({takes})")
        for target, keywords in zip(targets, filled, strict=True):
            if key in _options_of(target):
                keywords[key] = convert(f"{group}.{key}", value, _options_of(target)[key].annotation)
    for key, option in accepted.items():
        there = key in options or option.default is not inspect.Parameter.empty
        require(there, f"{group}.{key}: missing; {group} '{name}' needs it: {group}.{key}=…")
    return tuple(functools.partial(target, **kw) for target, kw in zip(targets, filled, strict=True))


@functools.cache
def _options_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters and their types; those of other parameters may be imported lazily."""
    parameters = inspect.signature(target).parameters.values()
    options = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    annotated = {name: p.annotation for name, p in options.items() if p.annotation is not inspect.Parameter.empty}
    names = vars(sys.modules[target.__module__])
    hints = typing.get_type_hints(types.SimpleNamespace(__annotations__=annotated), names)
    return {name: option.replace(annotation=hints.get(name, Any)) for name, option in options.items()}


def convert(key: str, value: object, wanted: object) -> Any:  # noqa: ANN401 (of the type wanted)
    """``value`` as type ``wanted``, or a `RequestError` that says what is needed.

    A number without a fraction is a whole number, a number or truth value is a text where no number is wanted; a text
    is neither, and a truth value is no number.

    >>> convert("lr", 1, float), convert("seed", 42.0, int), convert("path", ["a", "b"], str | list[str])
    (1.0, 42, ['a', 'b'])
    """
    for form in (
        lambda one: one,
        lambda one: int(one) if isinstance(one, float) and one.is_integer() else one,
        lambda one: str(one) if isinstance(one, (int, float)) else one,
    ):
        with contextlib.suppress(ValidationError):
            return _adapter(wanted).validate_python(_each(value, form), strict=True)
    raise RequestError(f"{key}={value!r}: {_wording(wanted)} is needed")


@functools.cache
def _adapter(wanted: Any) -> TypeAdapter[Any]:  # noqa: ANN401 (a type or a union, for which typing has no word)
    return TypeAdapter(wanted, config=ConfigDict(arbitrary_types_allowed=True))


def _each(value: object, form: Callable[[Any], object]) -> object:
    """``form`` of every value in lists and mappings; tuples become lists, keys texts."""
    if isinstance(value, Mapping):
        return {str(key): _each(inner, form) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each(inner, form) for inner in value]
    return form(value)


def _wording(wanted: object) -> str:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_wording, arguments))
    if origin in (list, dict):
        return "a list" if origin is list else "a mapping"
    words: dict[object, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return "null" if wanted is type(None) else words.get(wanted, getattr(wanted, "__name__", str(wanted)))
