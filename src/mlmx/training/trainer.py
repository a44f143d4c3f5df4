"""The trainer: `transformers.Trainer` with the loss, the seeds, the evaluation and the checkpoints of this project."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import TrainOutput

from mlmx.config.errors import WorkError
from mlmx.config.schema import KEEP_ALL
from mlmx.kernels import cpu
from mlmx.kernels.memory import Batch, brief, is_out_of_memory, parts, release
from mlmx.runs import checkpoints, signals
from mlmx.training import callbacks, failures, state
from mlmx.training.arithmetic import Corrected, MaskedLogits, in_full_precision, stock_batch

if TYPE_CHECKING:
    import optuna
    from _typeshed import SupportsLenAndGetItem

    Rows = SupportsLenAndGetItem[dict[str, Any]]  # chunks, ``{"input_ids": int[T], …}`` each
    Trial = optuna.Trial | dict[str, Any] | None

Norm = torch.Tensor | float | None
Count = torch.Tensor | int | None
Module = torch.nn.Module


class Trainer(transformers.Trainer):
    """Trains a masked LM, looks at every step before it moves the weights, and goes on exactly where it was left.

    A step is a window of micro-batches. It fails if its loss is not finite, or the norm of its gradient. In fp16
    infinite gradients are how the gradient scaler finds its scale, and only the loss counts.

    Args:
        name: of the arithmetic: ``corrected``, or ``stock`` for the library's loss, masks and evaluation to the bit.
        mlm_probability: the share of positions that the head is run on.
        scores: logged beside the evaluation of the stock arithmetic, in place of the other's.
        fills: the rows of the example table, made before training and after each epoch.
    """

    def __init__(
        self,
        name: str,
        arguments: TrainingArguments,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        train_chunks: Rows,
        eval_chunks: Rows,
        mask: Callable[[list[dict[str, Any]]], dict[str, Any]],
        mlm_probability: float,
        masked_logits: MaskedLogits,
        most_targets: int | None = None,
        scores: Callable[[PreTrainedModel], dict[str, float]],
        fills: Callable[[PreTrainedModel], list[dict[str, Any]]] | None = None,
        recorder: callbacks.Recorder,
        on_nan: str = "stop",
        stop_early: callbacks.StopEarly | None = None,
        keep: str = KEEP_ALL,
        save_seconds: float = math.inf,
    ) -> None:
        self.corrected = None if name == "stock" else Corrected(arguments, masked_logits, most_targets)
        if self.corrected is None:
            mask = partial(stock_batch, DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability))
        super().__init__(model, arguments, mask, train_chunks, eval_chunks, tokenizer)
        if self.corrected is not None:
            self.loss_is_scaled_for_ga = True
            self.model_accepts_loss_kwargs = True  # makes the library count targets over the effective batch
        self.scores, self.fills, self.scored_step = scores, fills, -1
        self.checkpoints = state.Checkpoints(arguments, keep, save_seconds)
        # The micro-batches of the step so far, each with its number (1, 2, …, and 0 for its last one), their loss, and
        # the library's sum of losses before them, float[].
        self.window: list[tuple[int, Batch]] = []
        self.step_loss = self.sum_before = torch.tensor(0.0)
        self.owed, self.mishaps = state.Owed(), failures.Mishaps(arguments.train_batch_size, on_nan)
        self.throughput = callbacks.Throughput(mlm_probability)  # projecting the other positions is no useful work
        own = {"owed": self.owed, "mishaps": self.mishaps, "throughput": self.throughput}
        self.parts: dict[str, Any] = {**own, "optimizer": state.OptimizerState(self)}  # whose states a checkpoint holds
        self.loaded: dict[str, Any] = {}
        self.left = multiprocessing.RawValue("b", 0)  # by this training, its workers have to know
        self.reporter = callbacks.Reporter(recorder, self.throughput, self.is_world_process_zero(), stop_early)
        self.progress = callbacks.Progress(self.throughput, lambda: self.step_loss)
        self.remove_callback(transformers.PrinterCallback)
        for callback in (callbacks.Beginning(self.go_on), self.reporter, self.throughput, self.progress):
            self.add_callback(callback)

    def train(self, resume_from_checkpoint: Path | str | bool | None = None, *_: object, **__: object) -> TrainOutput:
        """From the checkpoint, or from the beginning; where a step asks for it, again from the newest checkpoint."""
        checkpoint, is_main = resume_from_checkpoint, self.reporter.is_main
        while True:
            if self.args.world_size > 1:  # the first process has the run's folder, and says
                [checkpoint] = broadcast_object_list([checkpoint])
            self.args.eval_on_start = checkpoint is None
            self.left.value = 0
            try:
                return super().train(None if checkpoint is None else str(checkpoint))
            except failures.RollBack:
                self.reporter.repeats_until = self.state.global_step + 1
                # leave the step, and what a process that resumes would make anew
                self.window.clear()
                self.optimizer = self.lr_scheduler = None
                self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
            finally:
                self.left.value = 1
                self.progress.close()
            checkpoint = checkpoints.newest_whole(self.checkpoints.folder) if is_main else None
            if is_main and checkpoint is None:
                what = "a step failed, and there is no whole checkpoint to go back to"
                raise WorkError(f"{what}; choose a lower lr or on_nan=skip")

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        inner.worker_init_fn = partial(failures.outlive_signals, inner.worker_init_fn, self.left)
        return loader

    def _run_epoch(self, *args: object, **kwargs: object) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed behind its last step
            self.control.should_training_stop = True
            return
        if self.mishaps.on_nan == "rollback" and self.state.global_step == 0:
            self._save_interim()  # to go back to, until there is another
        cast(Any, self.train_dataset).epoch = int(self.state.epoch or 0)  # before worker processes copy the dataset
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def training_step(self, model: Module, inputs: Batch, num_items_in_batch: Count = None) -> torch.Tensor:
        """The loss of the next micro-batch; where memory runs out, all of the step so far is done again, in parts."""
        self.throughput.count(inputs, self.args.world_size)
        if not self.window:
            self.sum_before, self.step_loss = self._tr_loss.clone(), torch.zeros_like(self._tr_loss)
        self.window.append((0 if self.accelerator.sync_gradients else len(self.window) + 1, inputs))
        undone = self.window[-1:]
        while True:
            try:
                for number, batch in undone:
                    loss = self.micro_batch(model, num_items_in_batch, number, batch)
                self.step_loss += loss
                return loss
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = brief(error)
            # Here the error is gone, and with it the tensors of the frames it had passed through. A backward pass
            # that broke off has left gradients of its own, so all of the step so far is done again.
            release()
            never = None if self.corrected else "with trainer.name=stock"
            never = "with several processes" if self.args.world_size > 1 else never
            self.mishaps.split(self.state.global_step + 1, reason, never, self._record)
            model.zero_grad()
            undone = self.window

    def micro_batch(self, model: Module, num_items: Count, number: int, inputs: Batch) -> torch.Tensor:
        """Forward and backward of a micro-batch, in as many parts as memory needs; returns its loss."""
        if self.corrected is None:
            return super().training_step(model, inputs, num_items)
        step, whole, losses = self.state.global_step, cast(Module, self.model), []
        if self.mishaps.splits == 1:
            with self.corrected.drawing(whole, step, number):
                return super().training_step(model, inputs, num_items)
        for place, part in enumerate(parts(inputs, self.mishaps.rows_at_once)):
            with self.corrected.drawing(whole, step, number, place):
                losses.append(super().training_step(model, part, num_items))
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Count = None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        if self.corrected is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        share = self.mishaps.rows_at_once, self.mishaps.batch_size
        loss, logits = self.corrected.loss(model, inputs, num_items_in_batch, share)
        return (loss, {"logits": logits}) if return_outputs else loss

    @property
    def _norm_is_ours(self) -> bool:
        return self.corrected is not None and self.args.device.type == "cpu" and self.accelerator.scaler is None

    def _clip_grad_norm(self, model: Module) -> torch.Tensor:
        if self._norm_is_ours:
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
            return cpu.clip(model.parameters(), self.args.max_grad_norm, optimizer)
        norm: torch.Tensor = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        return norm

    def _get_grad_norm(self, model: Module, grad_norm: Norm = None) -> Norm:
        """Asked for once a step: after the last backward pass, before the optimizer. None of a step that fails."""
        if grad_norm is None and self._norm_is_ours:
            grad_norm = cpu.total_norm(model.parameters())
        norm: Norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        loss = self.accelerator.reduce(self.step_loss, reduction="mean")  # one loss and verdict for all processes
        judged = [loss] if norm is None or self.accelerator.scaler is not None else [loss, norm]
        finite = torch.stack([torch.as_tensor(one, device=loss.device).float() for one in judged]).isfinite().all()
        if not finite:
            step, values = self.state.global_step + 1, (float(loss), math.nan if norm is None else float(norm))
            self.mishaps.leave(step, *values, self.state.max_steps, self.checkpoints.folder, self._record)
            model.zero_grad(set_to_none=True)  # without gradients an optimizer moves nothing, nor its own moments
            self._tr_loss.copy_(self.sum_before)  # train/loss is the mean over the steps applied
            self._globalstep_last_logged += 1
            norm = None
        self.window.clear()
        return norm

    def _record(self, metrics: dict[str, float]) -> None:
        """Numbers of the step at hand, which the library has not counted yet."""
        share = self.current_gradient_accumulation_steps / len(cast(Any, self.callback_handler.train_dataloader))
        self.reporter.record(self.state.global_step + 1, (self.state.epoch or 0.0) + share, metrics)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Norm, *others: object, learning_rate: float | None = None
    ) -> None:
        """As the library's, called when a step has ended and again when its epoch has; here a signal is obeyed."""
        saved_at, interim_after = self.checkpoints.saved_at, self.checkpoints.save_seconds
        self.owed.epoch_end = self._ends_epoch and self.state.global_step != self.owed.step
        self.owed.step, self.owed.grad_norm, self.owed.lr = self.state.global_step, grad_norm, learning_rate
        stop, late = signals.noted(), time.monotonic() - saved_at > interim_after
        if self.args.world_size > 1:  # what any process of this training wishes
            votes = torch.tensor([float(stop), float(late)], device=self.args.device)
            stop, late = (bool(vote) for vote in self.accelerator.reduce(votes, "sum"))
        if stop:
            self._save_interim()
            signals.raise_noted()
            raise SystemExit(143)  # the signal came to another process of this training
        try:
            library: Any = super()._maybe_log_save_evaluate
            library(tr_loss, grad_norm, *others, learning_rate)
        except signals.Interrupted:
            self._save_interim()
            raise
        if late and self.checkpoints.saved_at == saved_at:
            self._save_interim()

    @property
    def _ends_epoch(self) -> bool:
        return (self.state.epoch or 0.0) % 1 == 0 or self.state.global_step >= self.state.max_steps

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        # A score must not move what is trained: before the first step the random state is put back.
        # Scoring can be left at any moment, but not by one of several processes.
        with (
            torch.random.fork_rng(enabled=self.state.global_step == 0),
            contextlib.nullcontext() if self.args.world_size > 1 else signals.at_once(),
        ):
            found = super().evaluate() if self.corrected is None else {}
            model, rows = cast(PreTrainedModel, self.model), None
            with in_full_precision(model):
                scores = self.scores(model)
                if self.fills is not None and self.reporter.is_main and self._ends_epoch:
                    rows = self.fills(model)
            self.log(dict(scores))
            if rows:
                self.reporter.recorder.fills(self.state.global_step, self.state.epoch or 0.0, rows)
            for name, score in scores.items():  # by the names the library knows metrics by: eval/loss → eval_loss
                found[("" if name.startswith("eval/") else "eval_") + name.replace("/", "_")] = score
            if self.corrected is not None:
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        self.scored_step = self.state.global_step
        return found

    def _determine_best_metric(self, metrics: dict[str, float], trial: Trial) -> bool:
        # To the library any number is better that compares so, also that of a model whose loss is not finite.
        losses = [value for name, value in metrics.items() if name.endswith("loss")]
        return all(map(math.isfinite, losses)) and super()._determine_best_metric(metrics, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights, configuration and tokenizer; the library's own writes the arguments as a pickle beside them."""
        if self.args.should_save:
            model = self.accelerator.unwrap_model(cast(Module, self.model), keep_torch_compile=False)
            cast(PreTrainedModel, model).save_pretrained(cast(str, output_dir), state_dict=state_dict)
            cast(Any, self.processing_class).save_pretrained(output_dir)

    def _save_interim(self) -> None:
        self._save_checkpoint(cast(Module, self.model), None, interim=True)

    def _save_checkpoint(self, model: Module, trial: Trial, interim: bool = False) -> None:
        # Asked for and done: what a checkpoint owes is what comes after it.
        asked, self.control.should_save = self.control.should_save, self.control.should_save and interim
        self.store_flos()
        self.owed.flags = [flag for flag in state.FLAGS if getattr(self.control, flag)]
        # The library's sums behind the next logged loss, of all processes together, and behind the mean loss.
        since_log = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()  # type: ignore[no-untyped-call]
        total, logged = self._total_loss_scalar, self._globalstep_last_logged
        kept = {"interim": interim, "sums": {"since_log": since_log, "total": total, "last_logged": logged}}
        kept |= {name: part.state() for name, part in self.parts.items()}
        if self.args.should_save:
            self.checkpoints.write(self.state, kept, self._save)
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()
        self.control.should_save = asked
        self.checkpoints.saved_at = time.monotonic()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Module | None = None) -> None:
        self.loaded = state.read(Path(resume_from_checkpoint))
        own = cast(PreTrainedModel, self.accelerator.unwrap_model(cast(Module, self.model)))
        own.load_state_dict(load_file(Path(resume_from_checkpoint) / "model.safetensors"), strict=False)  # tied: once
        own.tie_weights()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loaded with the other parts; the library's own would read pickles, if there were any."""

    _load_scaler = _load_optimizer_and_scheduler

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Where the batches before have been skipped, which draws as well."""
        if self.loaded:
            state.load_random_states(self.loaded["random"])
            self.loaded = {}

    def go_on(self) -> None:
        """After loading: all parts as they were, and what the last step still owed."""
        self.checkpoints.saved_at = time.monotonic()
        if not self.loaded:
            return
        sums = self.loaded.pop("sums")
        self._tr_loss += sums["since_log"]  # the library has just set it to 0
        self._total_loss_scalar, self._globalstep_last_logged = sums["total"], sums["last_logged"]
        for name, part in self.parts.items():
            part.load(self.loaded.pop(name))
        flags, epoch_end, norm, lr = self.owed.flags, self.owed.epoch_end, self.owed.grad_norm, self.owed.lr
        vars(self.control).update({flag: flag in flags for flag in state.FLAGS})
        step = self._tr_loss, norm, self.model_wrapped, None, self.state.epoch, None, time.time()
        if flags:
            self.owed.step = -1 if epoch_end else self.owed.step  # its epoch is still to end
            self._maybe_log_save_evaluate(*step, learning_rate=lr)
        if epoch_end:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._maybe_log_save_evaluate(*step, learning_rate=lr)


def run_and_save(trainer: Trainer, folder: Path, checkpoint: Path | None = None) -> None:
    """Train from the checkpoint or the beginning, then save the final model, loadable by ``pipeline`` alone.

    A signal (`Interrupted`) comes when a checkpoint was saved; a step that failed, or memory, may be a `WorkError`.
    """
    try:
        with signals.deferred():
            trainer.train(checkpoint)
            if trainer.scored_step != trainer.state.global_step or trainer.args.load_best_model_at_end:
                trainer.evaluate()  # the last numbers of a run are those of the model it saves
            if trainer.args.should_save:
                checkpoints.write(folder, lambda aside: trainer.save_model(str(aside)), manifest=False)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what = f"out of memory outside of forward and backward passes ({brief(error)})"
        choices = "a smaller model, chunk_size or trainer.per_device_eval_batch_size"
        raise WorkError(f"{what}: choose {choices}") from error
    signals.raise_noted()
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # whoever fills masks next gets fp32
