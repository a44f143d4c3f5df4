"""Functions from installed packages: entry points of the group ``mlmx.plugins``, named ``<stage>.<name>``.

- ``model.<name>``: → a `models.encoders.Encoder`
- ``dataset.<name>``: → rows ``{"text": str}`` as a ``datasets.Dataset``, see `data.texts.read`
- ``chunking.<name>``: `data.tokens.Tokens`, ``chunk_size`` → `data.chunks.Chunks` of at most so many tokens
- ``masking.<name>``: uniforms float64[B, T], word starts bool[B, T], targets to have float64[B, 1] → bool[B, T], where
  units begin; see `data.masking.strategy`
- ``metric.<name>``: logits float32[M, V], labels int64[M] → float[M], a value per target; see `evaluation.metrics`

Arrays are numpy's. Keyword-only parameters are the option's, checked as those of the shipped functions are; a metric
has none, and is computed wherever its package is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from mlmx.config.errors import RequestError, WorkError, brief, require

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")


def plugins(stage: str) -> list[str]:
    """The names of a stage's functions from installed packages."""
    return [point.name.partition(".")[2] for point in _points(tuple(sys.path)) if point.name.startswith(f"{stage}.")]


@lru_cache(maxsize=1)  # what is installed changes with the path alone, within a process
def _points(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group="mlmx.plugins"))


def load(stage: str, name: str) -> Callable[..., Any]:
    """A function of `plugins`; refused where two packages bring one of this name, or it cannot be imported."""
    found = {point.value: point for point in _points(tuple(sys.path)) if point.name == f"{stage}.{name}"}
    require(len(found) == 1, f"{stage} '{name}': is brought by {' and by '.join(found)}; uninstall one of them")
    [value] = found
    try:
        function = found[value].load()
    except Exception as error:  # of any kind: it runs the module
        raise RequestError(f"{stage} '{name}': the plugin {value} cannot be loaded ({brief(error)})") from error
    require(callable(function), f"{stage} '{name}': the plugin {value} is no function")
    return function  # type: ignore[no-any-return]


def states(**facts: object) -> Callable[[F], F]:
    """Makes a decorator by which a function says of itself what others need to know of it."""

    def stated(function: F) -> F:
        vars(function).update(facts)
        return function

    return stated


def call(stage: str, function: Callable[..., R], *arguments: object, fits: Callable[[Any], bool], needed: str) -> R:
    """What a stage's function gives; refused with stage and name if it is not what is needed, or the function fails."""
    try:
        given = function(*arguments)
    except (RequestError, WorkError, OSError, MemoryError):  # these say what they are
        raise
    except Exception as error:  # of any kind: it is somebody else's code
        raise RequestError(f"{_title(stage, function)}: fails ({brief(error)})") from error
    if fits(given):
        return given
    names = given if isinstance(given, dict) else getattr(given, "column_names", None)
    kind = type(given).__name__ + (f" of {', '.join(map(str, names))}" if names else "")
    if hasattr(given, "dtype") and hasattr(given, "shape"):
        kind = f"{given.dtype}{list(given.shape)}"  # ``int64[2, 8]``
    raise RequestError(f"{_title(stage, function)}: gives {kind}; {needed} is needed")


def _title(stage: str, function: Callable[..., Any]) -> str:
    own = function.func if isinstance(function, partial) else function
    return f"{stage} '{getattr(own, '__name__', own)}' of {own.__module__}"
