"""Which checkpoints a run keeps, and which of them is its best: the dial ``keep``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mlmx.config.commands import BEST_AND_LAST, KEEP_ALL

LOSSES = ("heldout/loss", "eval/loss")  # what checkpoints are compared by: the first that any of them has


def limit_of(keep: str) -> int | None:
    """How many of the newest checkpoints stay, whatever they score; None for all of them.

    >>> limit_of("all"), limit_of("best+last"), limit_of("3")
    (None, 1, 3)
    """
    return {KEEP_ALL: None, BEST_AND_LAST: 1}[keep] if keep in (KEEP_ALL, BEST_AND_LAST) else int(keep)


def loss_name(scores: Iterable[Mapping[str, float]]) -> str | None:
    """By which of `LOSSES` these are compared; None where none of them has one."""
    there = {name for one in scores for name in one}
    return next((name for name in LOSSES if name in there), None)


def best_step(scores: Mapping[int, Mapping[str, float]]) -> int | None:
    """The step with the lowest held-out loss, else evaluation loss; the earlier of equals.

    A step with a loss that is not finite is never the best.

    >>> best_step({5: {"heldout/loss": 2.0, "eval/loss": 3.0}, 10: {"heldout/loss": 1.5, "eval/loss": math.nan}})
    5
    """
    name = loss_name(scores.values()) or ""
    finite = {
        step: one[name]
        for step, one in sorted(scores.items())
        if name in one and all(math.isfinite(one[loss]) for loss in LOSSES if loss in one)
    }
    return min(finite, key=lambda step: finite[step], default=None)


def scores_of(history: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """The losses of each step by our names, from rows with a ``step``; the library's own are ``eval_loss``."""
    found: dict[int, dict[str, float]] = {}
    for row in history:
        for name in LOSSES:
            value = row.get(name, row.get(name.replace("/", "_")))
            if value is not None:
                found.setdefault(int(row["step"]), {})[name] = float(value)
    return found
