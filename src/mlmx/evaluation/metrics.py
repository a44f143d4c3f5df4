"""Metrics: a value per target, reported as the mean over all targets, and the direction that is better.

A metric maps logits float[M, V] and labels long[M] to float[M], and is logged under its name as ``eval/<name>`` and
``heldout/<name>``. Ours get tensors where they lie; those of plugins (entry points ``metric.<name>`` of `mlmx.plugins`)
get numpy arrays that are not to be written to. Directions are known without torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlmx.config.errors import RequestError
from mlmx.config.options import table
from mlmx.config.plugins import F, call, load, plugins, states
from mlmx.data.heldout import BANDS, PIECES

if TYPE_CHECKING:
    import torch

Metric = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def metric(*, higher_is_better: bool) -> Callable[[F], F]:
    """Says in which direction a metric is better; a plugin's must."""
    return states(higher_is_better=higher_is_better)


@metric(higher_is_better=False)
def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.float(), labels, reduction="none")


@metric(higher_is_better=True)
def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """1 where the likeliest token is the right one."""
    return (logits.argmax(-1) == labels).float()


METRICS: dict[str, Metric] = table(loss, accuracy)
# Numbers that are no mean over targets, and whether more of them is better.
OTHERS = {"perplexity": False, "bits_per_byte": False, "tokens_per_second": True, "mfu": True}
TAKEN = (*METRICS, *OTHERS, "keys", "tokens")  # the last two beside the metrics' sums in heldout.npz


def all_metrics() -> dict[str, Metric]:
    """Ours, and those of installed plugins; refuses one that cannot be imported or does not keep to its contract."""
    return METRICS | {name: partial(_on_tensors, _of_plugin(name)) for name in plugins("metric")}


def _of_plugin(name: str) -> Callable[..., Any]:
    function = load("metric", name)
    who, fault = f"metric '{name}' of {function.__module__}", "taken" if name in TAKEN else "no identifier"
    if name in TAKEN or not name.isidentifier():
        raise RequestError(f"{who}: its name is {fault}; give another in its package (taken: {', '.join(TAKEN)})")
    if not isinstance(getattr(function, "higher_is_better", None), bool):
        way_on = "decorate it with @metric(higher_is_better=…) of mlmx.evaluation.metrics"
        raise RequestError(f"{who}: does not say which direction is better; {way_on}")
    return function


def _on_tensors(function: Callable[..., Any], logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.from_numpy(_values(function, logits.float().numpy(force=True), labels.numpy(force=True)))


def _values(
    function: Callable[..., Any], logits: NDArray[np.float32], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """What a plugin's function gives for float32[M, V] and int64[M]."""
    for array in (logits, labels):
        array.flags.writeable = False  # other metrics get the very same

    def fits(given: object) -> bool:
        return isinstance(given, np.ndarray) and given.shape == labels.shape and given.dtype.kind == "f"

    needed = "float[M], a value for each of M targets,"
    return np.array(call("metric", function, logits, labels, fits=fits, needed=needed), np.float64)


def try_out() -> None:
    """See that the metrics of plugins keep to their contract, on three made-up targets."""
    logits = np.linspace(-4, 4, 3 * 8, dtype=np.float32).reshape(3, 8)
    for name in plugins("metric"):
        function = _of_plugin(name)
        values = _values(function, logits, np.array([7, 0, 3]))
        if not np.isfinite(values).all():
            given = f"gives {values.tolist()} of finite logits; a mean needs numbers"
            raise RequestError(f"metric '{name}' of {function.__module__}: {given}")


def higher_is_better(name: str) -> bool:
    """Whether more of a logged number is better, as its metric says; of one that nobody knows, less is."""
    kinds = "|".join([*BANDS, *PIECES])
    known = [*METRICS, *OTHERS, *plugins("metric")]
    named = [one for one in known if re.search(rf"(^|[/_]){re.escape(one)}(_({kinds}))?$", name)]
    found = max(named, key=len, default=None)
    if found is None or found in OTHERS:
        return found is not None and OTHERS[found]
    return bool(getattr(METRICS.get(found) or _of_plugin(found), "higher_is_better", False))
