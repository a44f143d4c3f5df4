"""What a user may ask for: one dataclass per command, and the rules every key is checked by.

Hydra composes YAML into these dataclasses. A group option (``model: scratch``) is ``name:`` plus the
keyword-only arguments of the function of that name in a stage's table; `bind` checks the one against
the other, so a function's signature is its schema. Nothing here imports torch, and nothing after
`to_config` changes a value.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from mlmx.places import conf_dir

Options = dict[str, Any]
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
HELDOUT: Options = {"dataset": None, "documents": 400, "share": 0.02}


class RequestError(ValueError):
    """The request was wrong: one line saying what was given, what is allowed and what to do."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the nearest choice, or nothing.

    >>> did_you_mean("chunk_sze", ["chunk_size", "lr"])
    '; did you mean chunk_size?'
    """
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def require(ok: bool, message: str) -> None:
    """Raise `RequestError` with ``message`` unless ``ok``."""
    if not ok:
        raise RequestError(message)


# ---------------------------------------------------------------------------------- the commands


@dataclass
class TrainConfig:
    """Dials of ``train``; the groups below them are free mappings that `bind` checks."""

    chunk_size: int = 512
    mlm_probability: float = 0.15
    lr: float = 2e-5
    epochs: float = 3
    batch_size: int = 8
    weight_decay: float = 0.01
    seed: int = 42
    precision: str = "auto"
    run_name: str | None = None
    note: str | None = None
    example: str = "This is a great [MASK]."
    heldout: Options = field(default_factory=lambda: dict(HELDOUT), metadata={"group": False})
    model: Options = field(default_factory=dict)
    dataset: Options = field(default_factory=dict)
    chunking: Options = field(default_factory=dict)
    masking: Options = field(default_factory=dict)
    trainer: Options = field(default_factory=dict)
    tracking: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            self.chunk_size >= 3,
            f"chunk_size={self.chunk_size}: a chunk needs at least 3 tokens (two can be nothing but special "
            "tokens); give a whole number from 3 up to what the model can hold",
        )
        require(
            0 < self.mlm_probability < 1,
            f"mlm_probability={self.mlm_probability:g}: the share of tokens to mask must lie between 0 and 1, "
            "both excluded; the usual value is 0.15",
        )
        for name in ("lr", "epochs"):
            value = getattr(self, name)
            require(
                0 < value < math.inf,
                f"{name}={value:g}: must be a number greater than 0; the default is "
                f"{type(self).__dataclass_fields__[name].default:g}",
            )
        require(self.batch_size >= 1, f"batch_size={self.batch_size}: must be at least 1; the default is 8")
        require(
            0 <= self.weight_decay < math.inf,
            f"weight_decay={self.weight_decay:g}: must be 0 or more; the default is 0.01",
        )
        require(0 <= self.seed < 2**32, f"seed={self.seed}: must lie between 0 and 4294967295")
        require(
            self.precision in PRECISIONS,
            f"precision={self.precision}: choose one of {', '.join(PRECISIONS)}"
            f"{did_you_mean(self.precision, PRECISIONS)}",
        )


@dataclass
class PrepareConfig:
    """Dials of ``prepare``: those of ``train`` that decide what the data is."""

    chunk_size: int = 512
    mlm_probability: float = 0.15
    seed: int = 42
    preview: int = 0
    heldout: Options = field(default_factory=lambda: dict(HELDOUT), metadata={"group": False})
    model: Options = field(default_factory=dict)
    dataset: Options = field(default_factory=dict)
    chunking: Options = field(default_factory=dict)
    masking: Options = field(default_factory=dict)


@dataclass
class EvaluateConfig:
    """Dials of ``evaluate``."""

    run: str = "last"
    chunk_size: int | None = None
    batch_size: int = 32
    dataset: Options = field(default_factory=dict)
    tracking: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size={self.batch_size}: must be at least 1")
        require(
            self.chunk_size is None or self.chunk_size >= 3,
            f"chunk_size={self.chunk_size}: a chunk needs at least 3 tokens",
        )


@dataclass
class PredictConfig:
    """Dials of ``predict``."""

    run: str = "last"
    text: list[str] = field(default_factory=list)
    top_k: int = 5

    def __post_init__(self) -> None:
        require(self.top_k >= 1, f"top_k={self.top_k}: must be at least 1; the default is 5")


@dataclass
class UiConfig:
    """Dials of ``ui``."""

    port: int = 5000
    tracking: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(1 <= self.port <= 65535, f"port={self.port}: must lie between 1 and 65535")


Config = TrainConfig | PrepareConfig | EvaluateConfig | PredictConfig | UiConfig
CONFIGS: dict[str, type[Config]] = {
    "train": TrainConfig,
    "prepare": PrepareConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "ui": UiConfig,
}


@dataclass(frozen=True)
class Job:
    """Where and how a command was asked for, beside its dials."""

    folder: Path
    overrides: tuple[str, ...] = ()
    choices: Mapping[str, str] = field(default_factory=dict)


def register_schemas() -> None:
    """Make each root's dataclass known to Hydra as ``<command>_schema``.

    The groups accept any key at composition (``trainer.warmup_steps=10`` needs no ``+``): `bind` checks
    them against the function that will take them, which says more than "key not in struct".
    """
    for command, schema in CONFIGS.items():
        node = OmegaConf.structured(schema)
        for name in open_nodes(schema):
            node[name]._set_flag("struct", False)
        ConfigStore.instance().store(name=f"{command}_schema", node=node)


def group_names(schema: type[Config]) -> list[str]:
    """Root keys that are config groups.

    >>> group_names(UiConfig)
    ['tracking']
    """
    return [name for name in open_nodes(schema) if schema.__dataclass_fields__[name].metadata.get("group", True)]


def open_nodes(schema: type[Config]) -> list[str]:
    """Root keys that take any key at composition and are checked by `bind`: the groups, and ``heldout``."""
    return [f.name for f in fields(schema) if f.type == "Options"]


def to_config(command: str, composed: DictConfig) -> Config:
    """Hydra's composition as a plain dataclass, every root key checked (``+key=…`` slips past Hydra)."""
    known = [f.name for f in fields(CONFIGS[command])]
    for key in map(str, composed):
        require(
            key in known,
            f"{key}: unknown key{did_you_mean(key, known)} (python -m mlmx {command} --help lists them)",
        )
    refuse_targets(composed)
    return from_plain(command, typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True)))


def from_plain(command: str, values: Mapping[str, Any]) -> Config:
    """A command's dataclass from plain values, types converted and checked."""
    schema = CONFIGS[command]
    checked = {}
    hints = typing.get_type_hints(schema)
    for name, value in values.items():
        require(name in hints, f"{name}: unknown key{did_you_mean(name, hints)}")
        checked[name] = convert(name, value, hints[name])
    return schema(**checked)


def refuse_targets(node: Any, path: str = "") -> None:
    """A config must not be able to run code: names are looked up in tables, ``_target_`` is refused."""
    if OmegaConf.is_dict(node):
        for key in node:
            require(
                key != "_target_",
                f"{path}{key}: a config names functions by 'name:', _target_ is not accepted; "
                "your own functions come in through the entry point group mlmx.plugins",
            )
            refuse_targets(node._get_node(key), f"{path}{key!s}.")
    elif OmegaConf.is_list(node) and not node._is_none() and not node._is_interpolation():
        for index in range(len(node)):
            refuse_targets(node._get_node(index), f"{path}{index}.")


def load_option(group: str, option: str) -> Options:
    """A shipped option of a group (``conf/dataset/imdb.yaml``) as plain values, for use in another place."""
    folder = conf_dir() / group
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    require(
        option in known,
        f"{group}={option}: no such option{did_you_mean(option, known)} (options: {', '.join(known)})",
    )
    return typing.cast(Options, OmegaConf.to_container(OmegaConf.load(folder / f"{option}.yaml"), resolve=True))


# --------------------------------------------------------------------- names and their signatures

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
    """A user's own function: entry point ``<group>.<name>`` in the group ``mlmx.plugins``."""
    found = [point for point in entry_points(group="mlmx.plugins") if point.name == f"{group}.{name}"]
    require(
        bool(found),
        f"{group}.name={name}: unknown{did_you_mean(name, functions)} (known: {', '.join(functions)})",
    )
    return typing.cast(F, found[0].load())


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
        return float(value)
    if wanted is int and number:
        return int(value) if float(value).is_integer() else _NO
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
