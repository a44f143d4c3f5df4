"""What a training counts, reports and shows of itself; no callback knows the trainer."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mlmx.kernels.flops import flops_per_token, matmul_peak

log = logging.getLogger("mlmx")
LINE_EVERY_SECONDS, LOOK_EVERY_SECONDS = 15.0, 0.5  # reading the loss waits for the device: not at every step
StopEarly = Callable[[float, Mapping[str, float]], bool]  # the epoch and its scores → whether that is enough


class Beginning(TrainerCallback):
    """Calls a function where the library has set its counters to their beginnings."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.call()


class Throughput(TrainerCallback):
    """Tokens of the training so far, and its seconds from step end to step end: loading, masking and all passes."""

    def __init__(self, scored_share: float) -> None:
        self.scored_share = scored_share  # of the positions, by the head
        self.tokens, self.seconds = 0, 0.0
        self.marked = (0, 0.0)  # both at the last log
        self.began: float | None = None  # the training, on the clock of `time.perf_counter`
        self.since, self.chunk_size = 0.0, 0
        self.flops: dict[int, float] = {}  # per token, by chunk size

    def state(self) -> dict[str, Any]:
        waited = time.perf_counter() - (self.began or time.perf_counter())
        return {"tokens": self.tokens, "seconds": self.seconds, "marked": self.marked, "waited": waited}

    def load(self, state: Mapping[str, Any]) -> None:
        self.tokens, self.seconds, self.marked = state["tokens"], state["seconds"], tuple(state["marked"])
        self.began = time.perf_counter() - state["waited"]

    def count(self, inputs: Mapping[str, torch.Tensor], num_processes: int) -> None:
        """A micro-batch, as large in every process."""
        mask = inputs.get("attention_mask")
        self.tokens += num_processes * (inputs["input_ids"].numel() if mask is None else int(mask.sum()))
        self.chunk_size = inputs["input_ids"].shape[1]

    def on_epoch_begin(self, *_: object, **__: object) -> None:
        self.since = time.perf_counter()
        self.began = self.began or self.since

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if control.should_log and torch.cuda.is_available():
            torch.cuda.synchronize()  # else the clock would stop before the device does
        self.seconds += time.perf_counter() - self.since
        self.since = time.perf_counter()

    def on_evaluate(self, *_: object, **__: object) -> None:
        self.since = time.perf_counter()  # scoring is no training time, nor is saving

    on_save = on_evaluate

    def since_log(self, args: TrainingArguments, model: PreTrainedModel) -> dict[str, float]:
        """How fast the steps since the last log were, and the whole training so far.

        ``train/tokens_per_second`` and ``perf/mfu`` (share of the machine's own matrix-product peak that was useful)
        leave scoring and saving out; ``perf/tokens_per_second`` has them in: tokens per second that one waits.
        """
        speed = (self.tokens - self.marked[0]) / max(self.seconds - self.marked[1], 1e-9)
        self.marked = (self.tokens, self.seconds)
        waited = time.perf_counter() - (self.began or 0.0)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        if self.chunk_size not in self.flops:
            self.flops[self.chunk_size] = flops_per_token(model, self.chunk_size, self.scored_share)
        peak = matmul_peak(args.device.type, dtype) * args.world_size
        return {
            "train/tokens_per_second": speed,
            "perf/tokens_per_second": self.tokens / max(waited, 1e-9),
            "perf/mfu": self.flops[self.chunk_size] * speed / peak,
        }


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

    def __init__(self, recorder: Recorder, throughput: Throughput, is_main: bool, stop_early: StopEarly | None) -> None:
        self.recorder, self.throughput, self.is_main, self.stop_early = recorder, throughput, is_main, stop_early
        self.repeats_until = -1  # the step that training went back from; what steps before it report is on record

    def record(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Numbers of a step, by the main process alone and once."""
        if metrics and self.is_main and step >= self.repeats_until:
            self.recorder.log(step, epoch, metrics)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object) -> None:
        metrics: dict[str, float] = {}
        for key, value in cast(dict[str, float], given["logs"]).items():
            if name := self.NAMES.get(key, key if "/" in key else None):  # our own scores have one
                metrics[name] = float(value)
            elif key.startswith("eval_") and key not in self.TIMINGS:
                metrics[f"eval/{key.removeprefix('eval_')}"] = float(value)
        if "eval/loss" in metrics and "eval/perplexity" not in metrics:
            metrics["eval/perplexity"] = float(torch.tensor(metrics["eval/loss"], dtype=torch.float64).exp())
        if "train/loss" in metrics:
            metrics |= self.throughput.since_log(args, cast(PreTrainedModel, given["model"]))
        epoch, is_scored = state.epoch or 0.0, "heldout/loss" in metrics or "eval/loss" in metrics
        self.record(state.global_step, epoch, metrics)
        if is_scored and self.stop_early is not None and self.stop_early(epoch, metrics):
            log.info("epoch %g  no better than other trials were by then: ended early", epoch)
            self.recorder.prune()
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.is_main:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            self.recorder.checkpoint(folder, state.global_step, state.epoch or 0.0)


class Progress(TrainerCallback):
    """Steps done, tokens/s, loss and time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, throughput: Throughput, loss: Callable[[], torch.Tensor]) -> None:
        self.throughput, self.loss = throughput, loss  # the loss of the step that has just ended
        self.bar: Bar | None = None
        self.looked, self.start = 0.0, (0, 0.0)

    def on_train_begin(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        self.looked = time.monotonic()
        self.start = state.global_step, self.throughput.seconds  # a resumed training has some of both behind it
        if sys.stdout.isatty() and state.is_world_process_zero:
            said = TextColumn("{task.fields[speed]} tok/s · loss {task.fields[loss]} ·")
            counts = BarColumn(bar_width=None), MofNCompleteColumn()
            columns = TextColumn("training"), *counts, said, TimeRemainingColumn(compact=True)
            # Log lines pass through the bar's console while it is alive, so that neither tears the other.
            self.bar = Bar(*columns, console=Console(file=sys.stdout, soft_wrap=True), transient=True)
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, speed="–", loss="–")
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        now = time.monotonic()
        every = LOOK_EVERY_SECONDS if self.bar else LINE_EVERY_SECONDS
        if now - self.looked < every or not state.is_world_process_zero:
            return
        self.looked, seconds = now, self.throughput.seconds
        speed, loss = f"{self.throughput.tokens / max(seconds, 1e-9):,.0f}", f"{self.loss().item():.3f}"
        if self.bar:
            self.bar.update(self.task, completed=state.global_step, speed=speed, loss=loss)
            return
        steps, spent = state.global_step - self.start[0], seconds - self.start[1]
        left = spent / steps * (state.max_steps - state.global_step)  # of steps: scoring before them says nothing of it
        at, until = f"step {state.global_step} of {state.max_steps}", time.strftime("%H:%M:%S", time.gmtime(left))
        log.info("%s · %s tok/s · loss %s · %s left", at, speed, loss, until)

    def close(self) -> None:
        """Take the bar off the terminal, also when training ended by an error."""
        if self.bar:
            self.bar.stop()
            self.bar = None
