"""Numbers: sums over target tokens, divided once.

A batch maps to (totals, count); sums add, so a score moves neither with batch size nor with workers.
``score(a + b) == score(a) + score(b)``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlmx.config.labels import IGNORE_INDEX
from mlmx.data.chunks import Chunks
from mlmx.data.heldout import HeldoutChunks
from mlmx.evaluation.bootstrap import DocumentSums, Sums
from mlmx.evaluation.metrics import METRICS, Metric, all_metrics
from mlmx.models import head

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Batch = dict[str, "torch.Tensor"]
Rows = Chunks | Sequence[Mapping[str, Any]]
Collate = Callable[[Sequence[Any]], Batch]
Metrics = Mapping[str, Metric]
# Of the targets of a batch: the row of each, int64[M], its column, int64[M], and each metric's value, float64[M].
Targets = tuple[NDArray[np.int64], NDArray[np.int64], dict[str, "torch.Tensor"]]


def numbers(sums: Sums) -> dict[str, float]:
    """Each metric's mean over targets, and ``perplexity`` = exp(loss); NaN where there was no target."""
    if not sums.tokens:
        return dict.fromkeys([*all_metrics(), "perplexity"], math.nan)
    means = {name: total / sums.tokens for name, total in sums.totals.items()}
    try:
        perplexity = math.exp(means["loss"])
    except OverflowError:
        perplexity = math.inf
    return {"loss": means["loss"], "perplexity": perplexity, **means}


def score(model: PreTrainedModel, rows: Rows, collate: Collate, batch_size: int) -> Sums:
    """Add up the targets of all rows."""
    sums = Sums()
    with exactly(model):
        for _, column, values in targets(model, rows, collate, batch_size, all_metrics()):
            sums += Sums(len(column), {name: float(value.sum()) for name, value in values.items()})
    return sums


def score_documents(
    model: PreTrainedModel, rows: HeldoutChunks, collate: Collate, batch_size: int, metrics: Metrics | None = None
) -> DocumentSums:
    """Score held-out rows, summed per document; targets are added in the order of the rows, whatever the batch size."""
    metrics = all_metrics() if metrics is None else metrics
    tokens = np.zeros(len(rows.keys), np.int64)
    totals = {name: np.zeros(len(rows.keys)) for name in metrics}
    with exactly(model):
        for row, _, values in targets(model, rows, collate, batch_size, metrics):
            documents = rows.rows_of[row]
            np.add.at(tokens, documents, 1)
            for name, value in values.items():
                np.add.at(totals[name], documents, value.numpy())
    order = np.argsort(rows.keys)  # documents in one order, wherever they were read from
    return DocumentSums(rows.keys[order], tokens[order], {name: total[order] for name, total in totals.items()})


def score_groups(
    model: PreTrainedModel, rows: HeldoutChunks, groups: NDArray[np.integer[Any]], collate: Collate, batch_size: int
) -> dict[int, Sums]:
    """Sums per group of targets; ``groups`` gives that of every held-out token, int[N]."""
    found: dict[int, Sums] = {}
    with exactly(model):
        for row, column, values in targets(model, rows, collate, batch_size, METRICS):
            of_target = groups[rows.starts[row] + column - len(rows.prefix)]
            for group in np.unique(of_target).tolist():
                chosen = np.flatnonzero(of_target == group)
                totals = {name: float(value[chosen].sum()) for name, value in values.items()}
                found[group] = found.get(group, Sums()) + Sums(len(chosen), totals)
    return found


def bits_per_byte(words: DocumentSums, word_bytes: NDArray[np.int64]) -> float:
    """Σ bits of all chosen words ÷ Σ their UTF-8 bytes: comparable between tokenizers; NaN without words."""
    total = int(word_bytes.sum())
    return float(words.totals["loss"].sum()) / math.log(2) / total if total else math.nan


def targets(
    model: PreTrainedModel, rows: Rows, collate: Collate, batch_size: int, metrics: Metrics
) -> Iterator[Targets]:
    """Metrics at each target of rows in their order, ``batch_size`` at a time; to be used inside `exactly`."""
    for first in range(0, len(rows), batch_size):
        batch = collate([rows[i] for i in range(first, min(first + batch_size, len(rows)))])
        row, column = (place.numpy() for place in batch["labels"].ne(IGNORE_INDEX).nonzero(as_tuple=True))
        if len(row):
            yield first + row, column, _values(model, batch, metrics)


def _values(model: PreTrainedModel, batch: Batch, metrics: Metrics) -> dict[str, torch.Tensor]:
    # Their memory is given back before the next batch.
    logits, labels = head.masked_logits(model, {name: value.to(model.device) for name, value in batch.items()})
    return {name: metric(logits, labels).double().cpu() for name, metric in metrics.items()}


def likeliest(
    model: PreTrainedModel, batch: Batch, top: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Inside `exactly`: of each target the likeliest ids, int64[M, top], their probabilities, that of the right id."""
    logits, labels = head.masked_logits(model, {name: value.to(model.device) for name, value in batch.items()})
    probabilities = logits.float().softmax(-1)
    found, own = probabilities.topk(top), probabilities.gather(1, labels[:, None])[:, 0]
    return found.indices.cpu().numpy(), found.values.cpu().numpy(), own.cpu().numpy()


@contextlib.contextmanager
def exactly(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model computes in fp32, without dropout and gradients, whatever it trains with."""
    import torch  # noqa: PLC0415 (slow to import)

    from mlmx.kernels.cpu import CpuKernels  # noqa: PLC0415 (imports torch)

    kernels = CpuKernels() if model.device.type == "cpu" else contextlib.nullcontext()
    if was_training := model.training:  # each change goes through all of its modules
        model.train(False)
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False), full_fp32(), kernels:
            yield
    finally:
        if was_training:
            model.train()


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """No TF32 inside the block: a score is the same whether or not training uses it."""
    import torch  # noqa: PLC0415 (slow to import)

    cudnn: Any = torch.backends.cudnn
    products, convolutions = torch.get_float32_matmul_precision(), cudnn.conv.fp32_precision
    torch.set_float32_matmul_precision("highest")
    cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        cudnn.conv.fp32_precision = convolutions
