"""The trainers: `transformers.Trainer` with the loss, the seeds and the evaluation of this project."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch.nn.functional import cross_entropy
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
)

from mlmx.config.errors import WorkError
from mlmx.kernels import gradients
from mlmx.kernels.cpu import CpuKernels
from mlmx.kernels.out_of_memory import Batch, brief, is_out_of_memory
from mlmx.runs import checkpoints, signals
from mlmx.training.guards import GuardedTrainer, RollBack
from mlmx.training.progress import Progress
from mlmx.training.reporter import Recorder, Reporter, StopEarly

MaskedLogits = Callable[[torch.nn.Module, Batch, int | None], tuple[torch.Tensor, torch.Tensor]]
Scores = Callable[[PreTrainedModel], dict[str, float]]
Fills = Callable[[PreTrainedModel], list[dict[str, Any]]]

ROWS = 32  # to a multiple of which the rows of targets are filled up: two tiles of AMX


class CountedTrainer(GuardedTrainer):
    """A Trainer that knows its speed and its latest loss, and whose first evaluation leaves no trace.

    Its own evaluation stays the library's; ``scores`` are logged beside it.
    """

    last_loss: torch.Tensor | None = None
    scored_step = -1
    chunk_size = 0

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        self.chunk_size = inputs["input_ids"].shape[1]
        mask = inputs.get("attention_mask")
        own = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        self.tokens_seen += own * self.args.world_size
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.last_loss = self.step_loss
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # A score must not move what is trained: before the first step the random state is put back.
        # Scoring can be left at any moment, but not by one of several processes.
        with (
            torch.random.fork_rng(enabled=self.state.global_step == 0),
            contextlib.nullcontext() if self.args.world_size > 1 else signals.at_once(),
        ):
            found = self.scored(*args, **kwargs)
        self.scored_step = self.state.global_step
        return found

    def __init__(self, *, scores: Scores, fills: Fills | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scores = scores
        self.fills = fills

    def scored(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = super().evaluate(*args, **kwargs)
        return found | self.own_scores()

    def own_scores(self) -> dict[str, float]:
        """Our scores, logged, by the names the library knows metrics by: ``eval/loss`` → ``eval_loss``."""
        model = cast(PreTrainedModel, self.model)
        step, epoch, rows = self.state.global_step, self.state.epoch or 0.0, None
        with in_full_precision(model):
            found = self.scores(model)
            if self.fills is not None and self.is_world_process_zero() and (epoch % 1 == 0 or self._is_over()):
                rows = self.fills(model)
        self.log(dict(found))
        if rows:
            self.recorder.fills(step, epoch, rows)
        return {("" if name.startswith("eval/") else "eval_") + name.replace("/", "_"): v for name, v in found.items()}

    def _is_over(self) -> bool:
        return self.state.global_step >= self.state.max_steps


class CorrectedTrainer(CountedTrainer):
    """Loss = Σ cross-entropy ÷ masked tokens of the whole effective batch, over micro-batches and processes.

    The library multiplies loss and gradient by the accumulation steps for every masked-LM head that takes
    ``**kwargs`` without using them (huggingface/transformers#47688).
    """

    loss_is_scaled_for_ga = True
    splits_batches = True

    def __init__(self, *, masked_logits: MaskedLogits, most_targets: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.masked_logits = masked_logits
        self.most_targets = most_targets if self.args.device.type == "cuda" else None
        self.model_accepts_loss_kwargs = True  # makes the library count targets over the effective batch

    def part_of_batch(
        self, model: torch.nn.Module, inputs: Batch, num_items: torch.Tensor | int | None, place: tuple[int, ...]
    ) -> torch.Tensor:
        # Dropout is a function of (seed, step, place within the step, process), not of what was drawn before.
        key = (self.args.seed, self.state.global_step, *place, self.args.process_index)
        torch.manual_seed(hash(key) & (2**63 - 1))
        # Such a mode reaches neither what a compiler traces nor what a backward pass runs again.
        beyond = self.args.torch_compile or getattr(self.model, "is_activation_checkpointing", False)
        fast = self.args.device.type == "cpu" and not beyond
        with CpuKernels() if fast else contextlib.nullcontext():
            return super().part_of_batch(model, inputs, num_items, place)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        logits, labels = self.masked_logits(model, inputs, self._room(inputs["labels"]))
        total = cross_entropy(logits.float(), labels, reduction="sum")
        count = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        # max: an effective batch without targets has loss 0, not NaN. DDP averages gradients: undo it.
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss

    def _room(self, labels: torch.Tensor) -> int:
        """Rows of logits for a batch's targets: of few shapes, since kernels are made for each.

        On a GPU it is one, so that nothing waits for the device and compiled code is made once.
        """
        if self.most_targets:
            return -(-self.most_targets * self.rows_at_once // self._train_batch_size)
        return -(-int(labels.ne(-100).sum()) // ROWS) * ROWS

    @property
    def _norm_is_ours(self) -> bool:
        return self.args.device.type == "cpu" and self.accelerator.scaler is None

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        if self._norm_is_ours:
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
            return gradients.clip(model.parameters(), self.args.max_grad_norm, optimizer)
        return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._norm_is_ours:
            grad_norm = gradients.total_norm(model.parameters())
        return super()._get_grad_norm(model, grad_norm)

    def scored(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        scores = self.own_scores()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
        return scores


@contextlib.contextmanager
def in_full_precision(model: PreTrainedModel) -> Iterator[None]:
    """The model's own ``forward`` inside the block: accelerate wraps it in autocast for mixed precision.

    Scores are taken in fp32 whatever a run trains in, so that ``evaluate`` on the saved model repeats them.
    """
    wrapped, own = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    if own is not None:
        model.forward = own
    try:
        yield
    finally:
        if own is not None:
            model.forward = cast(Any, wrapped)


def make_trainer(
    name: str,
    arguments: TrainingArguments,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_chunks: Any,
    eval_chunks: Any,
    mask: Any,
    mlm_probability: float,
    masked_logits: MaskedLogits,
    most_targets: int | None = None,
    scores: Scores,
    fills: Fills | None = None,
    recorder: Recorder,
    on_nan: str = "stop",
    stop_early: StopEarly | None = None,
) -> CountedTrainer:
    """A trainer of the named arithmetic, reporting to ``recorder`` and showing its progress.

    Args:
        fills: the rows of the example table, made before training and after each epoch.
        on_nan: what becomes of a step whose loss or gradient is not finite: ``stop``, ``skip`` or ``rollback``.
        stop_early: is given each epoch and its scores, and says whether training ends there.
    """
    parts: dict[str, Any] = {"model": model, "args": arguments, "processing_class": tokenizer}
    parts |= {"scores": scores, "fills": fills, "recorder": recorder, "on_nan": on_nan}
    reporter = Reporter(recorder, mlm_probability, stop_early)  # projecting the other positions is no useful work
    trainer: CountedTrainer
    if name == "stock":
        trainer = CountedTrainer(
            train_dataset=InputIds(train_chunks),
            eval_dataset=InputIds(eval_chunks),
            data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=mlm_probability),
            **parts,
        )
    else:
        trainer = CorrectedTrainer(
            masked_logits=masked_logits,
            most_targets=most_targets,
            train_dataset=train_chunks,
            eval_dataset=eval_chunks,
            data_collator=mask,
            **parts,
        )
    trainer.remove_callback(PrinterCallback)
    reporter.trainer = trainer
    trainer.add_callback(reporter)
    trainer.add_callback(Progress(trainer))
    return trainer


class InputIds(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows as the stock collator expects them: ``{"input_ids": int64[T], "attention_mask": int64[T]}``."""

    def __init__(self, chunks: Any) -> None:
        self.chunks = chunks
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.tensor(self.chunks[index]["input_ids"], dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run_and_save(trainer: CountedTrainer, folder: Path, checkpoint: Path | None = None) -> None:
    """Train, then save the final model with its tokenizer, loadable by ``transformers.pipeline`` alone.

    Args:
        checkpoint: where to go on from; None for the beginning, with the score before training.

    Raises:
        Interrupted: a signal came, and a checkpoint was saved.
        WorkError: a step whose loss is not finite ended the training, or memory did not suffice.
    """
    try:
        with signals.deferred():
            while not trained(trainer, checkpoint):
                checkpoint = to_go_back_to(trainer)
            if trainer.scored_step != trainer.state.global_step or trainer.args.load_best_model_at_end:
                trainer.evaluate()  # the last numbers of a run are those of the model it saves
            if trainer.args.should_save:
                checkpoints.write(folder, lambda aside: trainer.save_model(str(aside)), manifest=False)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise WorkError(
            f"out of memory outside of forward and backward passes ({brief(error)}): choose a smaller model, chunk_size"
            " or trainer.per_device_eval_batch_size"
        ) from error
    signals.raise_noted()
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # whoever fills masks next gets fp32


def trained(trainer: CountedTrainer, checkpoint: Path | None) -> bool:
    """Train from the checkpoint, or from the beginning; false if it has to go back to a checkpoint instead."""
    if trainer.args.world_size > 1:  # the first process has the run's folder, and says
        [checkpoint] = broadcast_object_list([checkpoint])
    trainer.args.eval_on_start = checkpoint is None
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return True
    except RollBack:
        trainer.forget_step()
        return False
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Progress):
                callback.close()


def to_go_back_to(trainer: CountedTrainer) -> Path | None:
    """The newest whole checkpoint; None in a process that has no record of the run.

    Raises:
        WorkError: there is none.
    """
    if not trainer.is_world_process_zero():
        return None
    found = checkpoints.newest_whole(Path(str(trainer.args.output_dir)))
    if found is None:
        raise WorkError(
            "a step failed, and there is no whole checkpoint to go back to; choose a lower lr or on_nan=skip"
        )
    return found
