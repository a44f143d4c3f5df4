"""The trainers: `transformers.Trainer` with the loss, the seeds and the evaluation of this project."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mlmx.training.progress import Progress

Batch = dict[str, torch.Tensor]
MaskedLogits = Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]
Scores = Callable[[PreTrainedModel], dict[str, float]]


class Recorder(Protocol):
    """Where a training's numbers and checkpoints go."""

    def log(self, step: int, epoch: float, metrics: dict[str, float]) -> None: ...

    def checkpoint(self, folder: Path, step: int, epoch: float) -> None: ...


class CountedTrainer(Trainer):
    """A Trainer that knows its speed and its latest loss, and whose first evaluation leaves no trace.

    Its own evaluation stays the library's; ``scores`` are logged beside it.
    """

    tokens_seen = 0
    train_seconds = 0.0  # from step end to step end: loading, masking, forward, backward and optimizer
    last_loss: torch.Tensor | None = None
    scored_step = -1

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        own = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        self.tokens_seen += own * self.args.world_size
        self.last_loss = super().training_step(model, inputs, num_items_in_batch)
        return self.last_loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # A score must not move what is trained: before the first step the random state is put back.
        with torch.random.fork_rng(enabled=self.state.global_step == 0):
            found = self.scored(*args, **kwargs)
        self.scored_step = self.state.global_step
        return found

    def __init__(self, *, scores: Scores, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scores = scores

    def scored(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = super().evaluate(*args, **kwargs)
        return found | self.own_scores()

    def own_scores(self) -> dict[str, float]:
        """Our scores, logged, by the names the library knows metrics by: ``eval/loss`` → ``eval_loss``."""
        model = cast(PreTrainedModel, self.model)
        with in_full_precision(model):
            found = self.scores(model)
        self.log(dict(found))
        return {("" if name.startswith("eval/") else "eval_") + name.replace("/", "_"): v for name, v in found.items()}


class CorrectedTrainer(CountedTrainer):
    """Loss = Σ cross-entropy ÷ masked tokens of the whole effective batch, over micro-batches and processes.

    The library multiplies loss and gradient by the accumulation steps for every masked-LM head that takes
    ``**kwargs`` without using them (huggingface/transformers#47688).
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *, masked_logits: MaskedLogits, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.masked_logits = masked_logits
        self.model_accepts_loss_kwargs = True  # makes the library count targets over the effective batch
        self.micro_batch = 0

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        # Dropout is a function of (seed, step, micro-batch, process), not of what was drawn before.
        self.micro_batch = 0 if self.accelerator.sync_gradients else self.micro_batch + 1
        key = (self.args.seed, self.state.global_step, self.micro_batch, self.args.process_index)
        torch.manual_seed(hash(key) & (2**63 - 1))
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        logits, labels = self.masked_logits(model, inputs)
        total = cross_entropy(logits.float(), labels, reduction="sum")
        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        # max: an effective batch without targets has loss 0, not NaN. DDP averages gradients: undo it.
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss

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


class Reporter(TrainerCallback):
    """Names the library's numbers as ours and hands them, and each checkpoint, to the recorder."""

    TIMINGS = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
    NAMES: ClassVar = {"loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate"}

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.trainer: CountedTrainer
        self.marked = (0, 0.0)
        self.since = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_log and torch.cuda.is_available():
            torch.cuda.synchronize()  # else the clock would stop before the device does
        self.trainer.train_seconds += time.perf_counter() - self.since
        self.since = time.perf_counter()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.since = time.perf_counter()  # scoring is no training time

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.since = time.perf_counter()
        # before worker processes copy the dataset
        cast(Any, self.trainer.train_dataset).epoch = int(state.epoch or 0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        metrics = {name: float(logs[key]) for key, name in self.NAMES.items() if key in logs}
        own = {key: value for key, value in logs.items() if key.startswith("eval_") and key not in self.TIMINGS}
        metrics |= {f"eval/{key.removeprefix('eval_')}": float(value) for key, value in own.items()}
        metrics |= {key: float(value) for key, value in logs.items() if "/" in key}  # our own scores
        if "eval/loss" in metrics and "eval/perplexity" not in metrics:
            metrics["eval/perplexity"] = float(torch.tensor(metrics["eval/loss"], dtype=torch.float64).exp())
        if "train/loss" in metrics:
            metrics["train/tokens_per_second"] = self._speed()
        if metrics and state.is_world_process_zero:
            self.recorder.log(state.global_step, state.epoch or 0.0, metrics)

    def _speed(self) -> float:
        """Tokens per second of training steps since the last log; scoring and saving are not counted."""
        tokens, seconds = self.trainer.tokens_seen, self.trainer.train_seconds
        speed = (tokens - self.marked[0]) / max(seconds - self.marked[1], 1e-9)
        self.marked = (tokens, seconds)
        return speed

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            self.recorder.checkpoint(folder, state.global_step, state.epoch or 0.0)
        self.since = time.perf_counter()  # nor is saving


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
    scores: Scores,
    recorder: Recorder,
) -> CountedTrainer:
    """A trainer of the named arithmetic, reporting to ``recorder`` and showing its progress."""
    arguments.eval_on_start = True
    parts: dict[str, Any] = {"model": model, "args": arguments, "processing_class": tokenizer}
    reporter = Reporter(recorder)
    trainer: CountedTrainer
    if name == "stock":
        trainer = CountedTrainer(
            scores=scores,
            train_dataset=InputIds(train_chunks),
            eval_dataset=InputIds(eval_chunks),
            data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=mlm_probability),
            **parts,
        )
    else:
        trainer = CorrectedTrainer(
            masked_logits=masked_logits,
            scores=scores,
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


def run_and_save(trainer: CountedTrainer, folder: Path) -> None:
    """Train, then save the final model with its tokenizer, loadable by ``transformers.pipeline`` alone."""
    try:
        trainer.train()
        if trainer.scored_step != trainer.state.global_step or trainer.args.load_best_model_at_end:
            trainer.evaluate()  # the last numbers of a run are those of the model it saves
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Progress):
                callback.close()
    trainer.save_model(str(folder))
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # whoever fills masks next gets fp32
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and all of it is in config.yaml
