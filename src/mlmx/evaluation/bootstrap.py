"""Sums per held-out document, and what two runs differ by on them: numpy only, so that comparing needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlmx.config.errors import require

LEVEL, DRAWS, SEED = 0.95, 2000, 0
MOST_AT_ONCE = 2_000_000  # drawn documents
MOST_BYTES = 200_000_000  # of a file's arrays, unpacked


@dataclass(frozen=True)
class Sums:
    """Additive parts of a score."""

    tokens: int = 0  # number of targets
    totals: Mapping[str, float] = field(default_factory=dict)  # Σ over targets of each metric

    def __add__(self, other: Sums) -> Sums:
        names = {**self.totals, **other.totals}
        totals = {name: self.totals.get(name, 0.0) + other.totals.get(name, 0.0) for name in names}
        return Sums(self.tokens + other.tokens, totals)


@dataclass(frozen=True)
class DocumentSums:
    """Additive parts per held-out document: what two runs can be compared by, pair by pair."""

    keys: NDArray[np.uint64]  # [D], each document's key
    tokens: NDArray[np.int64]  # [D], number of targets
    totals: dict[str, NDArray[np.float64]]  # [D] per metric, Σ over the document's targets

    def sums(self) -> Sums:
        """All documents together."""
        return Sums(int(self.tokens.sum()), {name: float(total.sum()) for name, total in self.totals.items()})

    def save(self, path: Path) -> None:
        """One small .npz; no pickle."""
        arrays: dict[str, Any] = {"keys": self.keys, "tokens": self.tokens, **self.totals}
        np.savez_compressed(path, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> DocumentSums:
        """What `save` wrote; a ValueError of arrays larger than any run's, or not of one length."""
        with np.load(path, allow_pickle=False) as file:
            unpacked = sum(entry.file_size for entry in file.zip.infolist())
            if unpacked > MOST_BYTES:
                raise ValueError(f"{path}: holds {unpacked:,} bytes")
            totals = {name: file[name] for name in file.files if name not in ("keys", "tokens")}
            found = cls(file["keys"], file["tokens"], totals)
        if len({len(array) for array in (found.keys, found.tokens, *totals.values())}) > 1:
            raise ValueError(f"{path}: its arrays are not of one length")
        return found

    def same_targets(self, other: DocumentSums) -> bool:
        """Whether both are of the same targets, as far as their documents and numbers tell."""
        return np.array_equal(self.keys, other.keys) and np.array_equal(self.tokens, other.tokens)


@dataclass(frozen=True)
class Difference:
    """Mean loss per target of one run minus another's, with a bootstrap interval over documents."""

    mean: float
    low: float
    high: float

    @property
    def is_told_apart(self) -> bool:
        """Whether the interval leaves out no difference at all."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Resampled:
    """Bootstrap samples of the loss of several runs on the same targets, all runs on the same draws.

    Documents are drawn with replacement: they differ far more than runs do, and targets of one document are no
    independent observations (Koehn 2004, paired bootstrap).
    """

    samples: NDArray[np.float64]  # [draws, R], mean loss per target
    means: NDArray[np.float64]  # [R], that of all documents as they are

    def interval(self, run: int) -> tuple[float, float]:
        """That of the loss of one run, over documents."""
        return _quantiles(self.samples[:, run])

    def difference(self, one: int, other: int) -> Difference:
        """How much more loss ``one`` has than ``other``."""
        low, high = _quantiles(self.samples[:, one] - self.samples[:, other])
        return Difference(float(self.means[one] - self.means[other]), low, high)


def resampled(runs: Sequence[DocumentSums], *, draws: int = DRAWS) -> Resampled:
    """Bootstrap samples of runs that scored the same targets; refused where they did not."""
    first = runs[0]
    same = all(run.same_targets(first) for run in runs)
    require(same, "these runs did not score the same held-out targets; only runs of one protocol can be compared")
    losses = [np.ascontiguousarray(run.totals["loss"], np.float64) for run in runs]
    samples, rng, number = [], np.random.default_rng(SEED), len(first.keys)
    at_once = max(1, MOST_AT_ONCE // max(number, 1))
    for start in range(0, draws, at_once):
        some = min(at_once, draws - start)
        places = rng.integers(0, number, (some, number)) + number * np.arange(some)[:, None]
        # How often each document is in each of the next draws, float64[some, D].
        times = np.bincount(places.ravel(), minlength=some * number).reshape(some, number).astype(np.float64)
        # A product for each run: one for all rounds a run's sums by its place among them, and equal runs would differ.
        sums = np.stack([times @ of_run for of_run in losses], axis=1)
        samples.append(sums / np.maximum(times @ first.tokens, 1)[:, None])
    means = np.array([of_run.sum() for of_run in losses]) / max(int(first.tokens.sum()), 1)
    return Resampled(np.concatenate(samples), means)


def _quantiles(samples: NDArray[np.float64]) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)
