"""Which way a metric is better; without torch, so that comparing needs none."""

from __future__ import annotations

HIGHER_IS_BETTER = ("accuracy", "tokens_per_second", "mfu")


def higher_is_better(name: str) -> bool:
    """Whether a metric is better the higher it is, wherever and on whatever it was measured.

    >>> [higher_is_better(name) for name in ("heldout/accuracy", "final/heldout_accuracy_rare", "eval/loss")]
    [True, True, False]
    """
    return any(f"_{metric}_" in f"_{name.rpartition('/')[2]}_" for metric in HIGHER_IS_BETTER)
