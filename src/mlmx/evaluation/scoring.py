"""Numbers: sums over target tokens, divided once.

A batch maps to (totals, count); sums add, so a score moves neither with batch size nor with workers.
``score(a + b) == score(a) + score(b)``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from mlmx.config.labels import IGNORE_INDEX
from mlmx.config.options import table
from mlmx.evaluation.bootstrap import DocumentSums, Sums

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


MaskedLogits = Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]
# Of one batch: the row of each target, long[M], and each metric's value there, float64[M].
Values = tuple[torch.Tensor, dict[str, torch.Tensor]]


@torch.no_grad()
def values(model: torch.nn.Module, batches: Iterable[Batch], masked_logits: MaskedLogits) -> Iterator[Values]:
    """Each metric at each target, in fp32 without dropout, whatever precision the model trains in."""
    device = next(model.parameters()).device
    with evaluating(model), torch.autocast(device.type, enabled=False), full_fp32():
        for batch in batches:
            rows = batch["labels"].ne(IGNORE_INDEX).nonzero()[:, 0]
            if len(rows):
                logits, labels = masked_logits(model, {name: value.to(device) for name, value in batch.items()})
                yield rows, {name: metric(logits, labels).double().cpu() for name, metric in METRICS.items()}


def score(model: torch.nn.Module, batches: Iterable[Batch], masked_logits: MaskedLogits) -> Sums:
    """Add up the batches' targets."""
    sums = Sums()
    for rows, found in values(model, batches, masked_logits):
        sums += Sums(len(rows), {name: float(value.sum()) for name, value in found.items()})
    return sums


def score_documents(
    model: torch.nn.Module,
    rows: Any,
    collate: Callable[[Sequence[Any]], Batch],
    batch_size: int,
    masked_logits: MaskedLogits,
) -> DocumentSums:
    """Score held-out rows (`data.HeldoutChunks`), summed per document.

    Targets are added in the order of the rows, whatever the batch size.
    """
    tokens = np.zeros(len(rows.keys), np.int64)
    totals = {name: np.zeros(len(rows.keys)) for name in METRICS}
    first = 0
    for batch in batches_of(rows, collate, batch_size):
        for in_batch, found in values(model, [batch], masked_logits):
            documents = rows.rows_of[first + in_batch.numpy()]
            np.add.at(tokens, documents, 1)
            for name, value in found.items():
                np.add.at(totals[name], documents, value.numpy())
        first += len(batch["input_ids"])
    order = np.argsort(rows.keys)  # documents in one order, wherever they were read from
    return DocumentSums(rows.keys[order], tokens[order], {name: total[order] for name, total in totals.items()})


def score_groups(
    model: torch.nn.Module,
    rows: Any,
    groups: Callable[[Sequence[Any]], NDArray[np.integer[Any]]],
    collate: Callable[[Sequence[Any]], Batch],
    batch_size: int,
    masked_logits: MaskedLogits,
) -> dict[int, Sums]:
    """Sums per group of targets; ``groups`` gives the group of every position of a batch, int[B, T]."""
    found: dict[int, Sums] = {}
    for first in range(0, len(rows), batch_size):
        some = [rows[i] for i in range(first, min(first + batch_size, len(rows)))]
        batch = collate(some)
        targets = (batch["labels"] != IGNORE_INDEX).numpy()
        for _, by_metric in values(model, [batch], masked_logits):
            of_target = groups(some)[targets]
            for group in np.unique(of_target).tolist():
                chosen = torch.from_numpy(of_target == group)
                totals = {name: float(value[chosen].sum()) for name, value in by_metric.items()}
                found[group] = found.get(group, Sums()) + Sums(int(chosen.sum()), totals)
    return found


def bits_per_byte(words: DocumentSums, word_bytes: NDArray[np.int64]) -> float:
    """Σ bits of all chosen words ÷ Σ their UTF-8 bytes: comparable between tokenizers; NaN without words."""
    total = int(word_bytes.sum())
    return float(words.totals["loss"].sum()) / math.log(2) / total if total else math.nan


@torch.no_grad()
def likeliest(
    model: torch.nn.Module, batch: Batch, masked_logits: MaskedLogits, top: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Of each target the likeliest ids, int64[M, top], their probabilities, and that of the right id, float32[M]."""
    device = next(model.parameters()).device
    with evaluating(model), torch.autocast(device.type, enabled=False), full_fp32():
        logits, labels = masked_logits(model, {name: value.to(device) for name, value in batch.items()})
        probabilities = logits.float().softmax(-1)
        found, own = probabilities.topk(top), probabilities.gather(1, labels[:, None])[:, 0]
    return found.indices.cpu().numpy(), found.values.cpu().numpy(), own.cpu().numpy()


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """No TF32 inside the block: a score is the same whether or not training uses it."""
    cudnn: Any = torch.backends.cudnn
    products, convolutions = torch.get_float32_matmul_precision(), cudnn.conv.fp32_precision
    torch.set_float32_matmul_precision("highest")
    cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        cudnn.conv.fp32_precision = convolutions


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode inside the block, as it was after it."""
    was_training = model.training
    if was_training:  # each change goes through all of its modules
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def batches_of(rows: Any, collate: Callable[[Sequence[Any]], Batch], batch_size: int) -> Iterator[Batch]:
    """Rows in order, ``batch_size`` at a time; the last batch may be smaller."""
    for first in range(0, len(rows), batch_size):
        yield collate([rows[i] for i in range(first, min(first + batch_size, len(rows)))])
