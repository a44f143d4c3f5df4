"""What has gone wrong in a training so far, as its checkpoints keep it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Mishaps:
    """The part of a training's state that says what went wrong.

    Attributes:
        splits: parts that a micro-batch is cut into since memory ran out.
        skipped: optimizer steps that were not applied.
        rolled_back: optimizer steps that training went back from; one that fails again is skipped.
    """

    splits: int = 1
    skipped: list[int] = field(default_factory=list)
    rolled_back: list[int] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; what has been learnt since a training went back is kept."""
        self.skipped = list(state["skipped"])
        self.splits = max(self.splits, state["splits"])
        self.rolled_back = sorted({*self.rolled_back, *state["rolled_back"]})

    def skipped_before(self, step: int) -> int:
        """Length of the row of skipped steps that ends right before this one.

        >>> Mishaps(skipped=[2, 4, 5]).skipped_before(6)
        2
        """
        first = step
        while first - 1 in self.skipped:
            first -= 1
        return step - first
