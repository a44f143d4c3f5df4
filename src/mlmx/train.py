"""``train``: texts → tokens → chunks → masked batches → model → training → numbers → tracking."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlmx import (
    alive,
    data,
    describe,
    identity,
    interrupts,
    lineage,
    memory,
    model,
    provenance,
    runs,
    space,
    tracking,
    training,
)
from mlmx.config import Job, TrainConfig
from mlmx.config.commands import KEEP_ALL
from mlmx.examples import Fills
from mlmx.measure import Material, Measure
from mlmx.parts import Parts, check_training, gather, parts_of, resume_of, store_of, token_cache
from mlmx.training import checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from mlmx.training.reporter import StopEarly

log = logging.getLogger("mlmx")
LONGEST_UNIT = 32  # tokens of one word or span


@dataclass(frozen=True)
class Ready:
    """Everything a training needs; making it has refused whatever can be refused."""

    arguments: TrainingArguments
    material: Material
    model: PreTrainedModel
    measure: Measure


def check(cfg: TrainConfig) -> None:
    """Everything that can be judged before torch is imported and anything is written."""
    check_training(cfg)


def train(cfg: TrainConfig, job: Job, stop_early: StopEarly | None = None) -> float:
    """One run, from the baseline to the saved model; returns its last ``heldout/loss``.

    Args:
        stop_early: is given each epoch and its scores, and says whether that was enough.
    """
    if os.environ.get("RANK", "0") != "0":
        return follow(cfg, job)
    dead = [run for run in alive.mark_dead() if run.folder != job.folder]
    return lead(cfg, job, dead, stop_early)


def follow(cfg: TrainConfig, job: Job) -> float:
    """The part of a further process of a distributed run (torchrun): it trains along and keeps no record."""
    runs.discard_empty(job.folder)
    with tempfile.TemporaryDirectory(prefix="mlmx-rank-") as folder:
        return lead(replace(cfg, tracking={"name": "none"}, resume={}), replace(job, folder=Path(folder)))


def lead(cfg: TrainConfig, job: Job, dead: Sequence[runs.Run] = (), stop_early: StopEarly | None = None) -> float:
    """A run with its record.

    Args:
        dead: runs whose processes were found gone; MLflow gets to know it as well.
    """
    memory.keep_freed()
    parts, clock, job = parts_of(cfg), Clock(), replace(job, overrides=identity.without_resume(job.overrides))
    with runs.log_to(), contextlib.ExitStack() as until_its_end:
        with token_cache() as cache:
            ready = make_ready(cfg, job, parts, clock, cache)
            require_space(job, ready, cfg.keep)
            until_its_end.enter_context(alive.held(job.folder))
            run = opened(cfg, job, ready)
            cache.keep()
        with runs.log_to_file(run), recorded(run, parts.store, clock) as tracker, lineage.kept(run):
            fills = partial(describe.fills, ready.model, ready.material.tokenizer, cfg.example, model.fill_masks)
            announce(cfg, job, ready)
            before = fills()  # before MLflow's thread wants Python as well, at each of its many small operations
            start_record(cfg, job, ready, tracker)
            tracker.settle([run for run in dead if store_of(run) == parts.store])
            fit(cfg, ready, run, tracker, stop_early)
            clock.lap("train")
            log.info("before training  %s\nafter training   %s", before, fills())
            conclude(ready, run, tracker)
            draw_plots(run, describe.run_name(cfg, job))
        log.info("%s", describe.ending(run, tracker.last, clock.seconds, tracker.store))
    return tracker.last.get("heldout/loss", tracker.last.get("eval/loss", math.nan))


def opened(cfg: TrainConfig, job: Job, ready: Ready) -> runs.Run:
    """The run's folder, new or, with ``resume=``, the one it was interrupted in.

    Raises:
        RequestError: the folder holds another run, or what is asked for is not the run in it.
    """
    inputs = inputs_of(ready)
    folder, allowed = resume_of(cfg)
    if folder is None:
        return runs.begin(job.folder, cfg, job.overrides, inputs)
    run = runs.Run(job.folder)
    before = identity.dials(run.config()) | (run.read_json("inputs.json") or inputs)
    drift = identity.differences(before, identity.dials(cfg) | inputs)
    identity.require_allowed(drift, allowed)
    for key, (was, now) in drift.items():
        log.info("resume: %s was %s, is %s from here on", key, was, now)
    return runs.reopen(run, cfg, job.overrides, inputs, drift)


def require_space(job: Job, ready: Ready, keep: str) -> None:
    """Refuse a run that the disk has no place for."""
    if not ready.arguments.should_save:
        return
    weights = sum(parameter.numel() * parameter.element_size() for parameter in ready.model.parameters())
    _, kept = training.saves(ready.arguments, len(ready.material.train_chunks), keep)
    needed = space.needed_bytes(weights, training.optimizer_bytes(ready.arguments, weights), kept)
    there = space.bytes_below(runs.Run(job.folder).checkpoints)  # of a run that is gone on with
    space.require_free(job.folder, needed - there, kept)


def inputs_of(ready: Ready) -> dict[str, Any]:
    """What a run is made of beyond its dials."""
    report = ready.material.report
    return {
        "data.train": report["train"]["sha256"],
        "data.eval": report["eval"]["sha256"],
        "data.heldout": ready.measure.protocol,
        "tokenizer": data.tokenizer_sha256(ready.material.tokenizer),
        "model.weights": model.weights_sha256(ready.model),
        "precision": describe.precision(ready.arguments),
        "processes": ready.arguments.world_size,
    }


def make_ready(cfg: TrainConfig, job: Job, parts: Parts, clock: Clock, cache: data.TokenCache) -> Ready:
    """Load and check all parts of the run; writes nothing.

    Raises:
        RequestError: an option the library refuses, a model or text that does not fit, too few chunks.
    """
    arguments = training.arguments(
        cfg.trainer,
        runs.Run(job.folder).checkpoints,
        lr=cfg.lr,
        epochs=cfg.epochs,
        batch_size=cfg.batch_size,
        weight_decay=cfg.weight_decay,
        seed=cfg.seed,
        precision=cfg.precision,
    )
    material = gather(cfg, parts, describe.source_name(cfg, job), cache)
    clock.lap("data")
    importlib.import_module("mlmx.training.engine")
    memory.settle()
    loaded = model.load_model(parts.encoder, material.tokenizer, cfg.seed)
    model.prompt_of(loaded, material.tokenizer, cfg.example)
    clock.lap("model")
    # The stock trainer scores eval/* itself.
    eval_chunks = None if cfg.trainer["name"] == "stock" else material.eval_chunks
    batch_size = arguments.per_device_eval_batch_size
    measure = Measure(material.tokenizer, material.mask, material.heldout, batch_size, eval_chunks)
    return Ready(arguments, material, loaded, measure)


def announce(cfg: TrainConfig, job: Job, ready: Ready) -> None:
    """Say what is about to happen."""
    log.info("%s", describe.introduction(cfg, job, ready.material.report, ready.arguments, ready.model))
    log.info("%s", describe.masked_sample(ready.material.mask, ready.material.train_chunks, ready.material.tokenizer))


def start_record(cfg: TrainConfig, job: Job, ready: Ready, tracker: tracking.Tracker) -> None:
    """Write to the run folder and to MLflow what is known before training."""
    tracker.start(
        describe.run_name(cfg, job),
        ready.measure.protocol,
        describe.params(cfg, job, ready.arguments, ready.model, ready.material.report),
        describe.tags(cfg, job, ready.material.report, ready.measure.protocol) | provenance.tags(),
        ready.material.report,
        cfg.register,
        rotates=cfg.keep != KEEP_ALL or bool(ready.arguments.save_total_limit),
    )


def fit(cfg: TrainConfig, ready: Ready, run: runs.Run, tracker: tracking.Tracker, stop_early: StopEarly | None) -> None:
    """Train from the baseline to the last epoch and save the model."""
    from mlmx.training.engine import make_trainer, run_and_save

    trainer = make_trainer(
        cfg.trainer["name"],
        ready.arguments,
        model=ready.model,
        tokenizer=ready.material.tokenizer,
        train_chunks=ready.material.train_chunks,
        eval_chunks=ready.material.eval_chunks,
        mask=ready.material.mask,
        mlm_probability=cfg.mlm_probability,
        masked_logits=model.masked_logits,
        most_targets=most_targets(cfg, ready.material.mask.rates),
        scores=ready.measure,
        fills=Fills(ready.material.examples, ready.material.tokenizer, ready.measure),
        recorder=tracker,
        on_nan=cfg.on_nan,
        stop_early=stop_early,
    )
    trainer.keep = cfg.keep
    trainer.save_seconds = math.inf if cfg.save_minutes is None else cfg.save_minutes * 60
    checkpoint = checkpoints.newest_whole(run.checkpoints)
    if checkpoint is not None:
        log.info("resume   from %s", checkpoint)
    run_and_save(trainer, run.model, checkpoint)
    tracker.model(run.model)


def most_targets(cfg: TrainConfig, rates: Sequence[float]) -> int:
    """More targets than a batch can have: the budget of each of its chunks, and a word or span beyond it."""
    return cfg.batch_size * (math.ceil(max(rates) * cfg.chunk_size) + LONGEST_UNIT)


def conclude(ready: Ready, run: runs.Run, tracker: tracking.Tracker) -> None:
    """What is measured once, at the end: losses by kind of word, and the sums that pairs of runs are compared by."""
    found = ready.measure.breakdown(ready.model, ready.material.train_chunks)
    step, epoch = tracker.latest
    if found:
        tracker.log(step, epoch, found)
        log.info("%s", describe.by_word(found))
    if ready.measure.documents is not None:
        with space.writing(run.folder / runs.HELDOUT_FILE):
            ready.measure.documents.save(run.folder / runs.HELDOUT_FILE)


def draw_plots(run: runs.Run, title: str) -> list[Any]:
    """The run's curves as PNG files."""
    from mlmx.tracking.plots import draw

    with space.writing(run.plots):
        return draw(run.metrics(), run.plots, title)


@contextlib.contextmanager
def recorded(run: runs.Run, store: tracking.Store | None, clock: Clock) -> Iterator[tracking.Tracker]:
    """A tracker whose run ends, however it ends, with its true status in the folder and in MLflow."""
    tracker, status, retry = tracking.Tracker(run, store), "FAILED", False
    space.reserve(run.folder)
    try:
        yield tracker
        status = "FINISHED"
    except (interrupts.Interrupted, KeyboardInterrupt, SystemExit) as error:
        status = "KILLED"
        if os.environ.get("RANK", "0") == "0":  # the other processes have no folder to go on in
            error.add_note(f"to go on: python -m mlmx train resume={shlex.quote(str(run.folder))}")
        raise
    except Exception as error:
        if retry := space.is_full(error):
            raise space.disk_full(error, run.folder) from error
        raise
    finally:
        space.release(run.folder)
        end(tracker, status, clock, retry or status == "KILLED")


def end(tracker: tracking.Tracker, status: str, clock: Clock, retry: bool) -> None:
    """Write down how a run ended; what goes wrong with that does not hide what ended it.

    Args:
        retry: it can begin again if it has no checkpoint; what failed for a reason of its own would fail again.
    """
    resumable = status != "FINISHED" and (retry or bool(checkpoints.all_of(tracker.run.checkpoints)))
    try:
        numbers = tracker.first, tracker.last
        tracker.annotate(describe.outcome(tracker.run, status, resumable, *numbers, tracker.store))
        tracker.finish(status, clock.seconds, resumable)
    except Exception as error:
        if status == "FINISHED" and space.is_full(error):
            raise space.disk_full(error, tracker.run.folder) from error
        if status == "FINISHED":
            raise
        log.warning("%s: that it is %s could not be written (%s)", tracker.run.folder, status, error)


@dataclass
class Clock:
    """Seconds spent per part of a run."""

    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def lap(self, name: str) -> None:
        """Book the time since the last lap under ``name``."""
        spent = time.monotonic() - self.began - sum(v for k, v in self.seconds.items() if k != "total")
        self.seconds[name] = round(spent, 3)
        self.seconds["total"] = round(time.monotonic() - self.began, 3)
