"""What a training reports: the library's numbers under our names, and how fast it went."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mlmx.kernels.flops import flops_per_token, matmul_peak

if TYPE_CHECKING:
    from mlmx.training.engine import CountedTrainer


log = logging.getLogger("mlmx")
StopEarly = Callable[[float, Mapping[str, float]], bool]  # the epoch and its scores → whether that is enough


class Recorder(Protocol):
    """Where a training's numbers and checkpoints go."""

    def log(self, step: int, epoch: float, metrics: dict[str, float]) -> None: ...

    def checkpoint(self, folder: Path, step: int, epoch: float) -> None: ...

    def fills(self, step: int, epoch: float, rows: list[dict[str, Any]]) -> None: ...

    def prune(self) -> None: ...


class Reporter(TrainerCallback):
    """Names the library's numbers as ours and hands them, and each checkpoint, to the recorder."""

    TIMINGS = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
    NAMES: ClassVar = {"loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate"}

    def __init__(self, recorder: Recorder, scored_share: float, stop_early: StopEarly | None = None) -> None:
        self.recorder = recorder
        self.stop_early = stop_early
        self.scored_share = scored_share  # of the positions, by the head
        self.trainer: CountedTrainer
        self.since = 0.0
        self.flops, self.measured_at = 0.0, 0

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
        self.trainer.began = self.trainer.began or self.since
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
            metrics |= self._speed(args)
        again = state.global_step < self.trainer.repeats_until  # these steps, and what they logged, were there before
        if metrics and state.is_world_process_zero and not again:
            self.recorder.log(state.global_step, state.epoch or 0.0, metrics)
        is_scored = "heldout/loss" in metrics or "eval/loss" in metrics
        if is_scored and self.stop_early is not None and self.stop_early(state.epoch or 0.0, metrics):
            log.info("epoch %g  no better than other trials were by then: ended early", state.epoch or 0.0)
            self.recorder.prune()
            control.should_training_stop = True

    def _speed(self, args: TrainingArguments) -> dict[str, float]:
        """How fast the steps since the last log were, and the whole training so far.

        ``train/tokens_per_second`` and ``perf/mfu`` (share of the machine's own matrix-product peak that was useful)
        leave scoring and saving out; ``perf/tokens_per_second`` has them in: tokens per second that one waits.
        """
        trainer = self.trainer
        tokens, seconds = trainer.tokens_seen, trainer.train_seconds
        speed = (tokens - trainer.marked[0]) / max(seconds - trainer.marked[1], 1e-9)
        trainer.marked = (tokens, seconds)
        waited = time.perf_counter() - (trainer.began or 0.0)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        if self.measured_at != trainer.chunk_size:
            self.measured_at = trainer.chunk_size
            self.flops = flops_per_token(trainer.model, trainer.chunk_size, self.scored_share)
        peak = matmul_peak(args.device.type, dtype) * args.world_size
        return {
            "train/tokens_per_second": speed,
            "perf/tokens_per_second": tokens / max(waited, 1e-9),
            "perf/mfu": self.flops * speed / peak,
        }

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            self.recorder.checkpoint(folder, state.global_step, state.epoch or 0.0)
        self.since = time.perf_counter()  # nor is saving
