"""Numbers: sums over target tokens, divided once.

A batch maps to (loss sum, correct, count); sums add, so a score moves neither with batch size nor with
workers. ``score(a + b) == score(a) + score(b)``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sums:
    """Additive parts of the metrics of masked language modelling.

    Attributes:
        loss: Σ cross-entropy in nats over targets, float64.
        correct: number of targets whose most likely token is the right one.
        tokens: number of targets.
    """

    loss: float = 0.0
    correct: int = 0
    tokens: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.loss + other.loss, self.correct + other.correct, self.tokens + other.tokens)


def numbers(sums: Sums) -> dict[str, float]:
    """``loss`` (nats per target), ``perplexity`` = exp(loss), ``accuracy`` (share of targets); NaN if no target.

    >>> numbers(Sums(loss=2.0, correct=1, tokens=2))["loss"]
    1.0
    """
    if not sums.tokens:
        return dict.fromkeys(("loss", "perplexity", "accuracy"), math.nan)
    loss = sums.loss / sums.tokens
    return {"loss": loss, "perplexity": perplexity(loss), "accuracy": sums.correct / sums.tokens}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond a float."""
    try:
        return math.exp(loss)
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
    total = Sums()
    with evaluating(model), torch.autocast(device.type, enabled=False):
        for batch in batches:
            on_device = {name: value.to(device) for name, value in batch.items()}
            logits, labels = masked_logits(model, on_device)
            if labels.numel():
                losses = cross_entropy(logits.float(), labels, reduction="none").double()
                correct = (logits.argmax(-1) == labels).sum()
                total += Sums(float(losses.sum()), int(correct), labels.numel())
    return total


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
