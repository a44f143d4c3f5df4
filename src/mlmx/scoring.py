"""Numbers: sums over target tokens, divided once.

A batch maps to (totals, count); sums add, so a score moves neither with batch size nor with workers.
``score(a + b) == score(a) + score(b)``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from mlmx.config import table

Batch = dict[str, torch.Tensor]


# ------------------------------------------------------------------------------------ the metrics
# A metric: float[M, V] logits and long[M] labels of M targets → float[M], one value per target. It is
# reported under its function's name as the mean over all targets.


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats."""
    return cross_entropy(logits.float(), labels, reduction="none")


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """1 where the likeliest token is the right one."""
    return (logits.argmax(-1) == labels).float()


Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
METRICS: dict[str, Metric] = table(loss, accuracy)


# ----------------------------------------------------------------------------------------- sums


@dataclass(frozen=True)
class Sums:
    """Additive parts of a score.

    Attributes:
        tokens: number of targets.
        totals: Σ over targets of each metric, float64.
    """

    tokens: int = 0
    totals: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Sums) -> Sums:
        names = [*self.totals, *(name for name in other.totals if name not in self.totals)]
        totals = {name: self.totals.get(name, 0.0) + other.totals.get(name, 0.0) for name in names}
        return Sums(self.tokens + other.tokens, totals)


def numbers(sums: Sums) -> dict[str, float]:
    """Each metric's mean over targets, and ``perplexity`` = exp(loss); NaN where there was no target.

    >>> numbers(Sums(2, {"loss": 2.0, "accuracy": 1.0}))["accuracy"]
    0.5
    """
    if not sums.tokens:
        return dict.fromkeys([*METRICS, "perplexity"], math.nan)
    means = {name: total / sums.tokens for name, total in sums.totals.items()}
    return {"loss": means["loss"], "perplexity": perplexity(means["loss"]), **means}


def perplexity(mean_loss: float) -> float:
    """exp(loss), infinite where that is beyond a float."""
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf


@torch.no_grad()
def score(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    masked_logits: Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]],
) -> Sums:
    """Add up the batches' targets in fp32 without dropout, whatever precision the model trains in."""
    device = next(model.parameters()).device
    sums = Sums()
    with evaluating(model), torch.autocast(device.type, enabled=False):
        for batch in batches:
            logits, labels = masked_logits(model, {name: value.to(device) for name, value in batch.items()})
            if labels.numel():
                totals = {name: float(metric(logits, labels).double().sum()) for name, metric in METRICS.items()}
                sums += Sums(labels.numel(), totals)
    return sums


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode inside the block, as it was after it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def batches_of(rows: Any, collate: Callable[[Sequence[Any]], Batch], batch_size: int) -> Iterator[Batch]:
    """Rows in order, ``batch_size`` at a time; the last batch may be smaller."""
    for first in range(0, len(rows), batch_size):
        yield collate([rows[i] for i in range(first, min(first + batch_size, len(rows)))])
