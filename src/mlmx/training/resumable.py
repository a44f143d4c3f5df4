"""A Trainer that takes up a training where its last checkpoint left it, as if nothing had happened.

What is beyond the library's own resuming: checkpoints that are whole or not there and hold no pickle, the sums behind
the next logged loss, and what a step still owed (its scores, the end of its epoch) when its checkpoint was saved.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import nested_gather

from mlmx.config.schema import BEST_AND_LAST, KEEP_ALL
from mlmx.runs import checkpoints, signals
from mlmx.runs.checkpoints import is_interim
from mlmx.training.mishaps import Mishaps

FORMAT = 1
FLAGS = ("should_log", "should_evaluate", "should_save")
STATES = ("optimizer", "scheduler", "scaler", "random")
TENSORS = "optimizer.safetensors"


class ResumableTrainer(Trainer):
    """Saves, loads and continues exactly; ends at a safe place when a signal was noted.

    Attributes:
        keep: which checkpoints stay, see `retention`; ``all`` leaves it to ``save_total_limit``.
        save_seconds: after so long without a checkpoint an interim one is saved, which the next one replaces.
        kept: what the checkpoint that was loaded says beyond weights and states.
        states: optimizer, scheduler, scaler and random states of that checkpoint.
        mishaps: what has gone wrong so far.
    """

    save_seconds = float("inf")
    keep = KEEP_ALL
    tokens_seen = 0
    train_seconds = 0.0  # from step end to step end: loading, masking, forward, backward and optimizer
    marked = (0, 0.0)  # tokens and seconds at the last log
    began: float | None = None  # when training began, on the clock of `time.perf_counter`

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mishaps = Mishaps()
        self.left = multiprocessing.RawValue("b", 0)  # shared with the loader's workers
        self.kept: dict[str, Any] = {}
        self.states: dict[str, Any] = {}
        self.steps_per_epoch = 1
        self.seen_step = -1
        self.owes_epoch_end = False
        self.interim = False
        self.saved_at = time.monotonic()
        self.last_norm: torch.Tensor | float | None = None
        self.last_lr: float | None = None
        self.add_callback(TakeUp(self))

    # ------------------------------------------------------------------------------------------ steps

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.left.value = 0
        try:
            return super().train(*args, **kwargs)
        finally:
            self.left.value = 1

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As the library's, with workers that outlive a signal to every process: they are needed to end a step."""
        loader: DataLoader[Any] = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = partial(_outlive_signals, inner.worker_init_fn, self.left)
        return loader

    def _init_training_state(self, max_steps: int, num_update_steps_per_epoch: int, *others: Any) -> tuple[int, int]:
        self.steps_per_epoch = num_update_steps_per_epoch
        found: tuple[int, int] = super()._init_training_state(max_steps, num_update_steps_per_epoch, *others)
        return found

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed behind its last step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: torch.nn.Module, *others: Any, **kwargs: Any
    ) -> None:
        """As the library's, called when a step has ended and again when its epoch has; here a signal is obeyed."""
        step = self.state.global_step
        ended, self.seen_step = self.seen_step != step, step
        self.owes_epoch_end = ended and (step % self.steps_per_epoch == 0 or step >= self.state.max_steps)
        self.last_norm = grad_norm
        self.last_lr = kwargs.get("learning_rate")
        saved_at = self.saved_at
        stop, late = self._agreed(signals.noted(), time.monotonic() - saved_at > self.save_seconds)
        if stop:
            self._save_interim()
            signals.raise_noted()
            raise SystemExit(143)  # the signal came to another process of this training
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *others, **kwargs)
        except signals.Interrupted:
            self._save_interim()
            raise
        if late and self.saved_at == saved_at:
            self._save_interim()

    def _agreed(self, *wishes: bool) -> list[bool]:
        """Each wish, if any process of this training has it."""
        if self.args.world_size == 1:
            return list(wishes)
        votes = torch.tensor([float(wish) for wish in wishes], device=self.args.device)
        return [bool(vote) for vote in self.accelerator.reduce(votes, "sum")]

    def take_up(self) -> None:
        """After loading: the counters as they were, and what the last step still owed."""
        kept, self.kept = self.kept, {}
        self.saved_at = time.monotonic()
        if not kept:
            return
        self._tr_loss += kept["loss_sum"]
        self._total_loss_scalar, self._globalstep_last_logged = kept["loss_total"], kept["last_logged"]
        self.tokens_seen, self.train_seconds = kept["tokens_seen"], kept["train_seconds"]
        self.marked = tuple(kept["marked"])
        self.began = time.perf_counter() - kept["waited"]
        self.mishaps.take_up(kept["mishaps"])
        for flag in FLAGS:
            setattr(self.control, flag, flag in kept["owed"])
        steps = [True] if kept["owed"] else []
        for of_step in [*steps, *([False] if kept["owes_epoch_end"] else [])]:
            if not of_step:
                self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            # what is owed by the end of an epoch comes behind what is owed by its last step
            self.seen_step = -1 if of_step and kept["owes_epoch_end"] else self.state.global_step
            model, lr = self.model_wrapped, kept["lr"]
            self._maybe_log_save_evaluate(
                self._tr_loss, kept["grad_norm"], model, None, self.state.epoch, None, time.time(), learning_rate=lr
            )
        self.seen_step = self.state.global_step

    # ----------------------------------------------------------------------------------------- saving

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights, configuration and tokenizer; the library's own writes the arguments as a pickle beside them."""
        if self.args.should_save:
            model = self.accelerator.unwrap_model(cast(torch.nn.Module, self.model), keep_torch_compile=False)
            cast(PreTrainedModel, model).save_pretrained(cast(str, output_dir), state_dict=state_dict)
            cast(Any, self.processing_class).save_pretrained(output_dir)

    def _save_interim(self) -> None:
        self.interim = True
        try:
            self._save_checkpoint(cast(torch.nn.Module, self.model), None)
        finally:
            self.interim = False

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """A checkpoint of this step, whole or not at all; older ones go as ``keep`` says."""
        # Asked for and done: what a checkpoint owes is what comes after it.
        asked, self.control.should_save = self.control.should_save, self.control.should_save and self.interim
        self.store_flos()
        gathered = nested_gather(self._tr_loss, self.args.parallel_mode)  # type: ignore[no-untyped-call]
        loss_sum = gathered.mean().item()
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"{checkpoints.PREFIX}{self.state.global_step}"
            if self.state.best_global_step:
                best = folder.with_name(f"{checkpoints.PREFIX}{self.state.best_global_step}")
                if best == folder or best.is_dir():
                    self.state.best_model_checkpoint = str(best)
            checkpoints.write(folder, lambda aside: self._fill(aside, loss_sum))
            found = self.state.best_model_checkpoint
            bests = (Path(found) if found else None, self._best_of(folder.parent))
            checkpoints.rotate(folder.parent, checkpoints.limit_of(self.keep) or self.args.save_total_limit, *bests)
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()
        self.control.should_save = asked
        self.saved_at = time.monotonic()

    def _best_of(self, folder: Path) -> Path | None:
        """The checkpoint that ``keep=best+last`` keeps; a resumed training's history has the scores of all."""
        if self.keep != BEST_AND_LAST:
            return None
        there = {checkpoints.step_of(path): path for path in checkpoints.all_of(folder) if not is_interim(path)}
        scores = checkpoints.scores_of(self.state.log_history)
        best = checkpoints.best_step({step: scores[step] for step in there if step in scores})
        return None if best is None else there[best]

    def _fill(self, aside: Path, loss_sum: float) -> None:
        self._save(str(aside))
        tensors: dict[str, torch.Tensor] = {}
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        scaler = getattr(self.accelerator, "scaler", None)
        states = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "random": random_states(),
        }
        kept = {
            "format": FORMAT,
            "interim": self.interim,
            "owed": [flag for flag in FLAGS if getattr(self.control, flag)],
            "owes_epoch_end": self.owes_epoch_end,
            "loss_sum": loss_sum,
            "loss_total": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "grad_norm": None if self.last_norm is None else float(self.last_norm),
            "lr": self.last_lr,
            "tokens_seen": self.tokens_seen,
            "train_seconds": self.train_seconds,
            "marked": self.marked,
            "waited": time.perf_counter() - (self.began or time.perf_counter()),
            "mishaps": self.mishaps.state(),
            **{name: checkpoints.flattened(state, tensors, name) for name, state in states.items()},
        }
        save_file(tensors, aside / TENSORS)
        (aside / "state.json").write_text(json.dumps(kept), encoding="utf-8")
        self.state.save_to_json(str(aside / "trainer_state.json"))

    # ---------------------------------------------------------------------------------------- loading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        kept, tensors = json.loads((folder / "state.json").read_text(encoding="utf-8")), load_file(folder / TENSORS)
        self.states = {name: checkpoints.restored(kept.pop(name), tensors) for name in STATES}
        self.kept = kept
        own = cast(PreTrainedModel, self.accelerator.unwrap_model(cast(torch.nn.Module, self.model)))
        own.load_state_dict(load_file(folder / "model.safetensors"), strict=False)  # tied weights are kept once
        own.tie_weights()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As saved, but for the rate and decay that were asked for: they may have been changed on purpose."""
        if checkpoint is None:
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        asked = [(group["initial_lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(self.states.pop("optimizer"))
        self.lr_scheduler.load_state_dict(self.states.pop("scheduler"))
        for group, (lr, decay) in zip(self.optimizer.param_groups, asked, strict=True):
            group["initial_lr"], group["weight_decay"] = lr, decay
        if isinstance(self.lr_scheduler, LambdaLR):
            scheduler = self.lr_scheduler
            scheduler.base_lrs = [lr for lr, _ in asked]
            at = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            rates = [base * factor for base, factor in zip(scheduler.base_lrs, at, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler, state = getattr(self.accelerator, "scaler", None), self.states.pop("scaler", None)
        if checkpoint is not None and scaler and state:
            scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        states = self.states.pop("random", None)
        if checkpoint is not None and states is not None:
            set_random_states(states)


class TakeUp(TrainerCallback):
    """Calls `take_up` where the library has set its counters to their beginnings."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.take_up()


def _outlive_signals(begin: Callable[[int], None] | None, left: Any, worker: int) -> None:
    """Set up a loader's worker: what ends it is its loader, or a signal once training was left."""

    def arrived(number: int, frame: object) -> None:
        if left.value:
            os._exit(0)

    for number in signals.SIGNALS:
        signal.signal(number, arrived)
    if begin is not None:
        begin(worker)


def random_states() -> dict[str, Any]:
    """The states of the global generators; the stock collator and dropout draw from them."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put the global generators back."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
