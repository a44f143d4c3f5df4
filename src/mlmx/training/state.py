"""What a checkpoint holds beyond weights, by parts that give their state and take it up again.

Beyond the library's own resuming: no pickle, the sums behind the next logged loss, and what the last step still owed
(its log, its scores, the end of its epoch) when its checkpoint was saved.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState, TrainingArguments

from mlmx.config.schema import BEST_AND_LAST
from mlmx.runs import checkpoints

TENSORS = "optimizer.safetensors"
FLAGS = ("should_log", "should_evaluate", "should_save")


@dataclass
class Owed:
    """What the step that ended last still owes, and what its log needs for that."""

    step: int = -1
    flags: list[str] = field(default_factory=list)  # of the library's control: what is to be done before the next step
    epoch_end: bool = False  # whether the end of its epoch is still to come
    grad_norm: torch.Tensor | float | None = None
    lr: float | None = None

    def state(self) -> dict[str, Any]:
        return vars(self) | {"grad_norm": None if self.grad_norm is None else float(self.grad_norm)}

    def load(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


class OptimizerState:
    """Optimizer, its schedule and the gradient scaler of fp16, which the library makes anew for each training."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer: Any = trainer

    def _kept(self) -> dict[str, Any]:
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        return {"optimizer": self.trainer.optimizer, "scheduler": self.trainer.lr_scheduler, "scaler": scaler}

    def state(self) -> dict[str, Any]:
        return {name: one.state_dict() if one else None for name, one in self._kept().items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """As saved, but for the rate and decay that were asked for: they may have been changed on purpose."""
        groups, scheduler = self.trainer.optimizer.param_groups, self.trainer.lr_scheduler
        asked = [(group["initial_lr"], group["weight_decay"]) for group in groups]
        for name, one in self._kept().items():
            if one and state[name]:
                one.load_state_dict(state[name])
        groups = self.trainer.optimizer.param_groups
        for group, (lr, decay) in zip(groups, asked, strict=True):
            group["initial_lr"], group["weight_decay"] = lr, decay
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [lr for lr, _ in asked]
            last, factors = scheduler.last_epoch, scheduler.lr_lambdas
            rates = [lr * factor(last) for lr, factor in zip(scheduler.base_lrs, factors, strict=True)]
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates  # noqa: SLF001 (what its get_last_lr returns)


def load_random_states(states: Mapping[str, Any]) -> None:
    """Put the global generators back."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


class Checkpoints:
    """Those of a training: what is in one, and which stay (``keep``: all of them leaves it to ``save_total_limit``).

    After ``save_seconds`` without a checkpoint an interim one is due, which the next one replaces.
    """

    def __init__(self, arguments: TrainingArguments, keep: str, save_seconds: float) -> None:
        self.folder = Path(str(arguments.output_dir))
        self.limit = checkpoints.limit_of(keep) or arguments.save_total_limit
        self.keep, self.save_seconds, self.saved_at = keep, save_seconds, time.monotonic()

    def write(self, state: TrainerState, parts: Mapping[str, Any], save_model: Callable[[str], None]) -> None:
        """One of this step with the state of each part, whole or not at all; older ones go as ``keep`` says."""
        folder = self.folder / f"{checkpoints.PREFIX}{state.global_step}"
        if state.best_global_step:
            best = folder.with_name(f"{checkpoints.PREFIX}{state.best_global_step}")
            if best == folder or best.is_dir():
                state.best_model_checkpoint = str(best)

        def fill(aside: Path) -> None:
            save_model(str(aside))
            tensors: dict[str, torch.Tensor] = {}
            # The stock collator and dropout draw from the global generators.
            drawn = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
            drawn |= {"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {}
            every = {**parts, "random": drawn}
            kept = {name: checkpoints.flattened(part, tensors, name) for name, part in every.items()}
            save_file(tensors, aside / TENSORS)
            (aside / "state.json").write_text(json.dumps({"format": checkpoints.FORMAT, **kept}), encoding="utf-8")
            state.save_to_json(str(aside / "trainer_state.json"))

        checkpoints.write(folder, fill)
        best_ones = [Path(state.best_model_checkpoint)] if state.best_model_checkpoint else []
        if self.keep == BEST_AND_LAST:  # a resumed training's history has the scores of all
            there = {checkpoints.step_of(path): path for path in checkpoints.all_of(self.folder)}
            scores = checkpoints.scores_of(state.log_history)
            asked = {at: scores[at] for at in there if at in scores and not checkpoints.is_interim(there[at])}
            step = checkpoints.best_step(asked)
            best_ones += [] if step is None else [there[step]]
        checkpoints.rotate(self.folder, self.limit, *best_ones)


def read(folder: Path) -> dict[str, Any]:
    """The state of each part of a training in a checkpoint."""
    kept, tensors = json.loads((folder / "state.json").read_text(encoding="utf-8")), load_file(folder / TENSORS)
    return {name: checkpoints.restored(part, tensors) for name, part in kept.items()}
