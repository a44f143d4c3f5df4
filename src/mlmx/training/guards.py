"""What a training does when a step goes wrong: a loss that is not finite, a batch that does not fit into memory."""

from __future__ import annotations

import logging
import math
import shlex
from pathlib import Path
from typing import Any

import torch

from mlmx.config.errors import WorkError
from mlmx.kernels.out_of_memory import Batch, brief, is_out_of_memory, parts, release
from mlmx.runs import checkpoints
from mlmx.training.reporter import Recorder
from mlmx.training.resumable import ResumableTrainer

log = logging.getLogger("mlmx")

MOST_SKIPPED_IN_A_ROW = 20
MOST_ROLLBACKS = 3


class RollBack(Exception):  # noqa: N818 (no error: a way of going on)
    """Training is to go on from its newest whole checkpoint."""


class GuardedTrainer(ResumableTrainer):
    """A Trainer that looks at every optimizer step before it moves the weights, and makes do with the memory there is.

    A step is a window of micro-batches. It fails if its loss is not finite, or the norm of its gradient. In fp16
    infinite gradients are how the gradient scaler finds its scale, and only the loss counts.

    Attributes:
        splits_batches: whether the loss of a micro-batch is the sum of its parts' losses.
        repeats_until: the step that training went back from, whose forerunners are being repeated.
    """

    splits_batches = False
    repeats_until = -1

    def __init__(self, *, recorder: Recorder, on_nan: str = "stop", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recorder = recorder
        self.on_nan = on_nan
        self.window: list[tuple[int, Batch]] = []  # each micro-batch of this step so far, with its number
        self.step_loss = self.loss_before = torch.tensor(0.0)

    # ------------------------------------------------------------------------------------ memory

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if not self.window:
            self.loss_before, self.step_loss = self._tr_loss.clone(), torch.zeros_like(self._tr_loss)
        number = 0 if self.accelerator.sync_gradients else len(self.window) + 1  # the step's last one has number 0
        self.window.append((number, inputs))
        undone = self.window[-1:]
        while True:
            try:
                for number, batch in undone:
                    loss = self.micro_batch(model, batch, num_items_in_batch, number)
                self.step_loss += loss
                return loss
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = brief(error)
            # Here the error is gone, and with it the tensors of the frames it had passed through. A backward pass
            # that broke off has left gradients of its own, so all of the step so far is done again.
            self._halve(reason)
            model.zero_grad()
            undone = self.window

    def micro_batch(
        self, model: torch.nn.Module, inputs: Batch, num_items: torch.Tensor | int | None, number: int
    ) -> torch.Tensor:
        """Forward and backward of a micro-batch, in as many parts as memory needs; returns its loss."""
        if self.mishaps.splits == 1:
            return self.part_of_batch(model, inputs, num_items, (number,))
        cut = enumerate(parts(inputs, self.rows_at_once))
        losses = [self.part_of_batch(model, part, num_items, (number, place)) for place, part in cut]
        return torch.stack(losses).sum()

    def part_of_batch(
        self, model: torch.nn.Module, inputs: Batch, num_items: torch.Tensor | int | None, place: tuple[int, ...]
    ) -> torch.Tensor:
        """Forward and backward of what is run at once; returns its loss.

        Args:
            place: the number of the micro-batch within the step and, where it is split, of the part within it.
        """
        return super().training_step(model, inputs, num_items)

    @property
    def rows_at_once(self) -> int:
        """Rows of a whole micro-batch that go through the model together."""
        return -(-self._train_batch_size // self.mishaps.splits)

    def _halve(self, reason: str) -> None:
        """Twice as many parts from here on.

        Raises:
            WorkError: a part is one row already, or splitting is not possible here.
        """
        release()
        step = self.state.global_step + 1
        if self.args.world_size > 1 or not self.splits_batches:
            why = "with several processes" if self.args.world_size > 1 else "with trainer.name=stock"
            raise WorkError(
                f"out of memory at step {step} ({reason}): {why} a batch is not split by itself; choose a smaller "
                "batch_size and as many times more trainer.gradient_accumulation_steps"
            )
        if self.rows_at_once == 1:
            raise WorkError(
                f"out of memory at step {step} with a single row ({reason}): choose a smaller chunk_size, or "
                "trainer.activation_checkpointing=true"
            )
        self.mishaps.splits *= 2
        self._record(step, {"perf/splits": float(self.mishaps.splits)})
        log.warning(
            "out of memory at step %d (%s): from here on each micro-batch of %d rows is run in parts of %d; batch, "
            "masks and loss stay the same",
            step,
            reason,
            self._train_batch_size,
            self.rows_at_once,
        )

    # ----------------------------------------------------------------------- a step that fails

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # The library asks for the norm once a step: after the last backward pass, before the optimizer.
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        loss = self.accelerator.reduce(self.step_loss, reduction="mean")  # one loss and one verdict for all processes
        judged = [loss] if norm is None or self.accelerator.scaler is not None else [loss, norm]
        finite = torch.stack([torch.as_tensor(one, device=loss.device).float() for one in judged]).isfinite().all()
        if not finite:
            self._refuse_step(model, float(loss), math.nan if norm is None else float(norm))
            norm = None
        self.window.clear()
        return norm

    def _refuse_step(self, model: torch.nn.Module, loss: float, norm: float) -> None:
        """Leave the step out, go back, or end the training; in any case it moves no weight.

        Raises:
            WorkError: as ``stop`` says, or because too much was left out.
            RollBack: the first time that this step fails.
        """
        step, mishaps = self.state.global_step + 1, self.mishaps
        in_a_row = mishaps.skipped_before(step)
        back = self.on_nan == "rollback" and step not in mishaps.rolled_back
        hopeless = in_a_row == min(MOST_SKIPPED_IN_A_ROW, self.state.max_steps - 1)
        if self.on_nan == "stop" or hopeless or (back and len(mishaps.rolled_back) == MOST_ROLLBACKS):
            self._record(step, {"train/loss": loss, "train/grad_norm": norm})
            raise WorkError(self._how_to_go_on(step, loss, norm))
        if step not in mishaps.rolled_back:
            self._record(step, {"train/failed_loss": loss, "train/failed_grad_norm": norm})
        if back:
            mishaps.rolled_back.append(step)
            self._record(step, {"train/rollbacks": float(len(mishaps.rolled_back))})
            log.warning("step %d fails (loss %g, gradient %g): back to the last checkpoint", step, loss, norm)
            self.repeats_until = step
            raise RollBack
        mishaps.skipped.append(step)
        self._record(step, {"train/skipped_steps": float(len(mishaps.skipped))})
        log.warning("step %d fails (loss %g, gradient %g): left out", step, loss, norm)
        # Without gradients an optimizer moves nothing, its own moments included.
        model.zero_grad(set_to_none=True)
        # train/loss is the mean over the steps applied.
        self._tr_loss.copy_(self.loss_before)
        self._globalstep_last_logged += 1

    def _how_to_go_on(self, step: int, loss: float, norm: float) -> str:
        before, found = self.mishaps, f"step {step} has loss {loss:g} and a gradient of norm {norm:g}"
        tried = ""
        if count := before.skipped_before(step):
            tried = f", as had the {count} steps before it, which were left out"
        if before.rolled_back:
            tried = f", after training went back from steps {', '.join(map(str, before.rolled_back))}"
        checkpoint_folder = Path(str(self.args.output_dir))
        least = f"{found}{tried}; the weights are those before it. Choose a lower lr"
        if not checkpoints.all_of(checkpoint_folder):
            return least + (", or on_nan=skip to leave such steps out" if self.on_nan == "stop" else "")
        dial, value = ("on_nan", "skip") if self.on_nan == "stop" else ("lr", "…")
        run = shlex.quote(str(checkpoint_folder.parent))
        again = f"python -m mlmx train resume={run} {dial}={value} resume.allow=[{dial}]"
        return f"{least}, or go on from the last checkpoint: {again}"

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        """Numbers of the step at hand, which the library has not counted yet; a repeated step's are there."""
        if self.is_world_process_zero() and step >= self.repeats_until:
            batches: Any = self.callback_handler.train_dataloader
            share = self.current_gradient_accumulation_steps / len(batches)
            self.recorder.log(step, (self.state.epoch or 0.0) + share, metrics)

    # ------------------------------------------------------------------------------ checkpoints

    def forget_step(self) -> None:
        """Leave a step that has failed, and what a process that resumes would make anew."""
        self.window.clear()
        self.optimizer = self.lr_scheduler = None
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.on_nan == "rollback" and self.state.global_step == 0:
            self._save_interim()  # to go back to, until there is another
        super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # To the library any number is better that compares so, also that of a model whose loss is not finite.
        losses = [value for name, value in metrics.items() if name.endswith("loss")]
        return all(map(math.isfinite, losses)) and super()._determine_best_metric(metrics, trial)
