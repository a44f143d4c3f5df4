"""What a person sees while a model trains: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from mlmx.training.engine import CountedTrainer

log = logging.getLogger("mlmx")
LINE_EVERY_SECONDS = 15.0
LOOK_EVERY_SECONDS = 0.5  # reading the loss waits for the device: not at every step


class Progress(TrainerCallback):
    """Steps done, tokens/s, loss and time left of the training steps."""

    def __init__(self, trainer: CountedTrainer) -> None:
        self.trainer = trainer
        self.bar: Bar | None = None
        self.looked = 0.0
        self.began = 0.0
        self.start = 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began = time.monotonic()
        self.start = state.global_step, self.trainer.train_seconds  # a resumed training has some of both behind it
        if sys.stdout.isatty() and state.is_world_process_zero:
            columns = (
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]} tok/s · loss {task.fields[loss]} ·"),
                TimeRemainingColumn(compact=True),
            )
            # Log lines pass through the bar's console while it is alive, so that neither tears the other.
            self.bar = Bar(*columns, console=Console(file=sys.stdout, soft_wrap=True), transient=True)
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, speed="–", loss="–")
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        every = LOOK_EVERY_SECONDS if self.bar else LINE_EVERY_SECONDS
        if now - max(self.looked, self.began) < every or not state.is_world_process_zero:
            return
        self.looked = now
        seconds = max(self.trainer.train_seconds, 1e-9)
        speed = self.trainer.tokens_seen / seconds
        loss = float("nan") if self.trainer.last_loss is None else self.trainer.last_loss.item()
        if self.bar:
            self.bar.update(self.task, completed=state.global_step, speed=f"{speed:,.0f}", loss=f"{loss:.3f}")
            return
        steps, spent = state.global_step - self.start[0], self.trainer.train_seconds - self.start[1]
        left = spent / steps * (state.max_steps - state.global_step)  # of steps: scoring before them says nothing of it
        log.info(
            "step %d of %d · %s tok/s · loss %.3f · %s left",
            state.global_step,
            state.max_steps,
            f"{speed:,.0f}",
            loss,
            time.strftime("%H:%M:%S", time.gmtime(left)),
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal, also when training ended by an error."""
        if self.bar:
            self.bar.stop()
            self.bar = None
