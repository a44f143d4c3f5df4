"""What a training does when a loss is not finite, a batch does not fit into memory, or its workers get a signal."""

from __future__ import annotations

import logging
import os
import shlex
import signal
from collections.abc import Callable, Mapping
from ctypes import c_byte
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlmx.config.errors import WorkError
from mlmx.runs import checkpoints
from mlmx.runs.signals import SIGNALS

log = logging.getLogger("mlmx")
MOST_SKIPPED_IN_A_ROW = 20
MOST_ROLLBACKS = 3
Record = Callable[[dict[str, float]], None]  # numbers of the step at hand


class RollBack(Exception):  # noqa: N818 (no error: a way of going on)
    """Training is to go on from its newest whole checkpoint."""


@dataclass
class Mishaps:
    """What has gone wrong in a training so far, and what becomes of a step that goes wrong next."""

    batch_size: int  # rows of a whole micro-batch
    on_nan: str = "stop"  # what becomes of a step whose loss or gradient is not finite: stop, skip or rollback
    splits: int = 1  # parts that a micro-batch is cut into since memory ran out
    skipped: list[int] = field(default_factory=list)  # optimizer steps that were not applied
    rolled_back: list[int] = field(default_factory=list)  # those that training went back from; the next time they skip

    def state(self) -> dict[str, Any]:
        return {"splits": self.splits, "skipped": self.skipped, "rolled_back": self.rolled_back}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; what has been learnt since a training went back is kept."""
        self.skipped = list(state["skipped"])
        self.splits = max(self.splits, state["splits"])
        self.rolled_back = sorted({*self.rolled_back, *state["rolled_back"]})

    def skipped_before(self, step: int) -> int:
        """Length of the row of skipped steps that ends right before this one.

        >>> Mishaps(8, skipped=[2, 4, 5]).skipped_before(6)
        2
        """
        first = step
        while first - 1 in self.skipped:
            first -= 1
        return step - first

    def way_on(self, step: int, max_steps: int) -> Literal["stop", "skip", "rollback"]:
        """What becomes of a step that fails; too many skipped in a row, or too many ways back, end the training.

        >>> mishaps = Mishaps(8, "rollback", rolled_back=[3])
        >>> mishaps.way_on(3, max_steps=10), mishaps.way_on(4, max_steps=10)
        ('skip', 'rollback')
        """
        if self.on_nan == "stop" or self.skipped_before(step) == min(MOST_SKIPPED_IN_A_ROW, max_steps - 1):
            return "stop"
        if self.on_nan == "skip" or step in self.rolled_back:
            return "skip"
        return "stop" if len(self.rolled_back) == MOST_ROLLBACKS else "rollback"

    def leave(self, step: int, loss: float, norm: float, max_steps: int, folder: Path, record: Record) -> None:
        """Leave out a step that fails, or end the training by a `WorkError`; the first time, `RollBack` may do."""
        way_on = self.way_on(step, max_steps)
        if way_on == "stop":
            record({"train/loss": loss, "train/grad_norm": norm})
            tried = ""
            if count := self.skipped_before(step):
                tried = f", as had the {count} steps before it, which were left out"
            if self.rolled_back:
                tried = f", after training went back from steps {', '.join(map(str, self.rolled_back))}"
            dial, value = ("on_nan", "skip") if self.on_nan == "stop" else ("lr", "…")
            go_on = ", or on_nan=skip to leave such steps out" if self.on_nan == "stop" else ""
            if checkpoints.all_of(folder):
                again = f"resume={shlex.quote(str(folder.parent))} {dial}={value} resume.allow=[{dial}]"
                go_on = f", or go on from the last checkpoint: python -m mlmx train {again}"
            found = f"step {step} has loss {loss:g} and a gradient of norm {norm:g}"
            raise WorkError(f"{found}{tried}; the weights are those before it. Choose a lower lr{go_on}")
        if step not in self.rolled_back:
            record({"train/failed_loss": loss, "train/failed_grad_norm": norm})
        if way_on == "rollback":
            self.rolled_back.append(step)
            record({"train/rollbacks": float(len(self.rolled_back))})
            log.warning("step %d fails (loss %g, gradient %g): back to the last checkpoint", step, loss, norm)
            raise RollBack
        self.skipped.append(step)
        record({"train/skipped_steps": float(len(self.skipped))})
        log.warning("step %d fails (loss %g, gradient %g): left out", step, loss, norm)

    @property
    def rows_at_once(self) -> int:
        """Rows of a whole micro-batch that go through the model together."""
        return -(-self.batch_size // self.splits)

    def split(self, step: int, reason: str, never: str | None, record: Record) -> None:
        """Twice as many parts from here on; a `WorkError` where a part is one row already, or ``never`` says why."""
        if never is not None:
            choose = "choose a smaller batch_size and as many times more trainer.gradient_accumulation_steps"
            raise WorkError(
                f"out of memory at step {step} ({reason}): {never} a batch is not split by itself; {choose}"
            )
        if self.rows_at_once == 1:
            choose = "choose a smaller chunk_size, or trainer.activation_checkpointing=true"
            raise WorkError(f"out of memory at step {step} with a single row ({reason}): {choose}")
        self.splits *= 2
        record({"perf/splits": float(self.splits)})
        then = "each micro-batch of %d rows is run in parts of %d; batch, masks and loss stay the same"
        said = "out of memory at step %d (%s): from here on " + then
        log.warning(said, step, reason, self.batch_size, self.rows_at_once)


def outlive_signals(begin: Callable[[int], None] | None, left: c_byte, worker: int) -> None:
    """Set up a worker, besides by ``begin``: its loader ends it, or a signal once training was ``left`` (not 0).

    Until then it is needed to end a step.
    """

    def arrived(number: int, frame: object) -> None:
        if left.value:
            os._exit(0)

    for number in SIGNALS:
        signal.signal(number, arrived)
    if begin is not None:
        begin(worker)
