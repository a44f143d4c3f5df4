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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlmx.commands import describe
from mlmx.config.schema import KEEP_ALL, Job, Resume, TrainConfig
from mlmx.data.cache import TokenCache
from mlmx.data.tokens import tokenizer_sha256
from mlmx.evaluation.fills import Fills
from mlmx.evaluation.measure import Measure
from mlmx.experiment import Material, Parts, check_training, gather, parts_of, token_cache
from mlmx.kernels import memory
from mlmx.models import head
from mlmx.models.encoders import load_model, weights_sha256
from mlmx.models.fill import prompt_of
from mlmx.runs import checkpoints, disk, identity, process, provenance, signals
from mlmx.runs.log import log_to, log_to_file
from mlmx.runs.metrics_file import loss_of
from mlmx.runs.run import HELDOUT_FILE, Run, begin_run, discard_empty
from mlmx.tracking.store import Store, store_of
from mlmx.tracking.tracker import Tracker
from mlmx.training.arguments import optimizer_bytes, saves, training_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from mlmx.training.callbacks import StopEarly

log = logging.getLogger("mlmx")
LONGEST_UNIT = 32  # tokens of one word or span


@dataclass(frozen=True)
class Ready:
    """Everything a training needs; making it has refused whatever can be refused."""

    arguments: TrainingArguments
    material: Material
    model: PreTrainedModel
    measure: Measure


check = check_training  # before torch is imported and anything is written


def train(cfg: TrainConfig, job: Job, stop_early: StopEarly | None = None) -> float:
    """One run, from the baseline to the saved model; returns its last ``heldout/loss``.

    ``stop_early`` is given each epoch and its scores, and says whether that was enough.
    """
    if os.environ.get("RANK", "0") == "0":
        dead = [run for run in process.mark_dead() if run.folder != job.folder]
        return _train(cfg, job, dead, stop_early)
    # A further process of a distributed run (torchrun) trains along and keeps no record.
    if job.sweep is not None:
        discard_empty(job.folder)  # a launcher makes one
    with tempfile.TemporaryDirectory(prefix="mlmx-rank-") as folder:
        return _train(replace(cfg, tracking={"name": "none"}, resume=Resume()), replace(job, folder=Path(folder)))


def _train(cfg: TrainConfig, job: Job, dead: Sequence[Run] = (), stop_early: StopEarly | None = None) -> float:
    """A run with its record; MLflow gets to know as well of dead runs, whose processes were found gone."""
    memory.keep_freed()
    parts, clock, job = parts_of(cfg), Clock(), replace(job, overrides=identity.without_resume(job.overrides))
    with log_to(), contextlib.ExitStack() as until_its_end:
        with token_cache() as cache:
            ready = make_ready(cfg, job, parts, clock, cache)
            require_space(job, ready, cfg.keep)
            until_its_end.enter_context(process.held(job.folder))
            run = opened(cfg, job, ready)
            cache.keep()
        model, tokenizer, report = ready.model, ready.material.tokenizer, ready.material.report
        with log_to_file(run), recorded(run, parts.store, clock) as tracker, provenance.kept(run):
            log.info("%s", describe.introduction(cfg, job, report, ready.arguments, model))
            log.info("%s", describe.masked_sample(ready.material.mask, ready.material.train_chunks, tokenizer))
            # Before MLflow's thread wants Python as well, at each of its many small operations.
            before = describe.fills(model, tokenizer, cfg.example)
            name, protocol = describe.run_name(cfg, job), ready.measure.protocol
            params = describe.params(cfg, job, ready.arguments, model, report)
            tags = describe.tags(cfg, job, report, protocol) | provenance.tags()
            rotates = cfg.keep != KEEP_ALL or bool(ready.arguments.save_total_limit)
            tracker.start(name, protocol, params, tags, report, cfg.register, rotates=rotates)
            tracker.settle([run for run in dead if store_of(run) == parts.store])
            fit(cfg, ready, run, tracker, stop_early)
            clock.lap("train")
            after = describe.fills(model, tokenizer, cfg.example)
            log.info("before training  %s\nafter training   %s", before, after)
            # Measured once: losses by kind of word, and the sums that pairs of runs are compared by.
            if found := ready.measure.breakdown(model, ready.material.train_chunks):
                tracker.log(*tracker.latest, found)
                log.info("%s", describe.by_word(found))
            if ready.measure.documents is not None:
                with disk.writing(run.folder / HELDOUT_FILE):
                    ready.measure.documents.save(run.folder / HELDOUT_FILE)
            draw_plots(run, name)
        log.info("%s", describe.ending(run, tracker.last, clock.seconds, tracker.store))
    return loss_of(tracker.last)


def opened(cfg: TrainConfig, job: Job, ready: Ready) -> Run:
    """The run's folder, new or, with ``resume=``, the one it was interrupted in; refused where it holds another run."""
    report = ready.material.report
    inputs = {  # what a run is made of beyond its dials
        "data.train": report["train"]["sha256"],
        "data.eval": report["eval"]["sha256"],
        "data.heldout": ready.measure.protocol,
        "tokenizer": tokenizer_sha256(ready.material.tokenizer),
        "model.weights": weights_sha256(ready.model),
        "precision": describe.precision(ready.arguments),
        "processes": ready.arguments.world_size,
    }
    if cfg.resume.run is None:
        return begin_run(job.folder, cfg, job.overrides, inputs, job.own)
    run = Run(job.folder)
    checkpoints.require_format(run.checkpoints)
    before = identity.dials(run.config()) | (run.read_json("inputs.json") or inputs)
    drift = identity.differences(before, identity.dials(cfg) | inputs)
    identity.require_allowed(drift, cfg.resume.allow)
    for key, (was, now) in drift.items():
        log.info("resume: %s was %s, is %s from here on", key, was, now)
    return begin_run(job.folder, cfg, job.overrides, inputs, job.own, drift)


def require_space(job: Job, ready: Ready, keep: str) -> None:
    """Refuse a run that the disk has no place for."""
    if not ready.arguments.should_save:
        return
    weights = sum(parameter.numel() * parameter.element_size() for parameter in ready.model.parameters())
    _, kept = saves(ready.arguments, len(ready.material.train_chunks), keep)
    needed = disk.needed_bytes(weights, optimizer_bytes(ready.arguments, weights), kept)
    there = disk.bytes_below(Run(job.folder).checkpoints)  # of a run that is gone on with
    disk.require_free(job.folder, needed - there, kept)


def make_ready(cfg: TrainConfig, job: Job, parts: Parts, clock: Clock, cache: TokenCache) -> Ready:
    """Load and check all parts of the run; writes nothing."""
    dials = {name: getattr(cfg, name) for name in ("lr", "epochs", "batch_size", "weight_decay", "seed", "precision")}
    arguments = training_arguments(cfg.trainer, Run(job.folder).checkpoints, **dials)
    material = gather(cfg, parts, describe.source_name(cfg, job), cache)
    clock.lap("data")
    importlib.import_module("mlmx.training.trainer")
    memory.settle()
    loaded = load_model(parts.encoder, material.tokenizer, cfg.seed)
    prompt_of(loaded, material.tokenizer, cfg.example)
    clock.lap("model")
    # The stock trainer scores eval/* itself.
    eval_chunks = None if cfg.trainer["name"] == "stock" else material.eval_chunks
    batch_size = arguments.per_device_eval_batch_size
    measure = Measure(material.tokenizer, material.mask, material.heldout, batch_size, eval_chunks)
    return Ready(arguments, material, loaded, measure)


def fit(cfg: TrainConfig, ready: Ready, run: Run, tracker: Tracker, stop_early: StopEarly | None) -> None:
    """Train from the baseline to the last epoch and save the model."""
    from mlmx.training.trainer import Trainer, run_and_save  # noqa: PLC0415 (imports torch)

    material = ready.material
    trainer = Trainer(
        cfg.trainer["name"],
        ready.arguments,
        model=ready.model,
        tokenizer=material.tokenizer,
        train_chunks=material.train_chunks,
        eval_chunks=material.eval_chunks,
        mask=material.mask,
        mlm_probability=cfg.mlm_probability,
        masked_logits=head.masked_logits,
        # More than a batch can have: the budget of each of its chunks, and a word or span beyond it.
        most_targets=cfg.batch_size * (math.ceil(max(material.mask.rates) * cfg.chunk_size) + LONGEST_UNIT),
        scores=ready.measure,
        fills=Fills(material.examples, material.tokenizer, ready.measure),
        recorder=tracker,
        on_nan=cfg.on_nan,
        stop_early=stop_early,
        keep=cfg.keep,
        save_seconds=math.inf if cfg.save_minutes is None else cfg.save_minutes * 60,
    )
    if checkpoint := checkpoints.newest_whole(run.checkpoints):
        log.info("resume   from %s", checkpoint)
    run_and_save(trainer, run.model, checkpoint)


def draw_plots(run: Run, title: str) -> None:
    """The run's curves as PNG files."""
    from mlmx.comparison.plots import plot_run  # noqa: PLC0415 (imports matplotlib)

    with disk.writing(run.plots):
        plot_run(run.metrics(), run.plots, title)


@contextlib.contextmanager
def recorded(run: Run, store: Store | None, clock: Clock) -> Iterator[Tracker]:
    """A tracker whose run ends, however it ends, with its true status in the folder and in MLflow."""
    tracker, status, retry = Tracker(run, store), "FAILED", False
    disk.reserve(run.folder)
    try:
        yield tracker
        status = "FINISHED"
    except (signals.Interrupted, KeyboardInterrupt, SystemExit) as error:
        status = "KILLED"
        if os.environ.get("RANK", "0") == "0":  # the other processes have no folder to go on in
            error.add_note(f"to go on: python -m mlmx train resume={shlex.quote(str(run.folder))}")
        raise
    except Exception as error:
        if retry := disk.is_full(error):
            raise disk.disk_full(error, run.folder) from error
        raise
    finally:
        disk.release(run.folder)
        # What failed for a reason of its own would fail again, unless it goes on from a checkpoint.
        has_begun = retry or status == "KILLED" or bool(checkpoints.all_of(run.checkpoints))
        resumable = status != "FINISHED" and has_begun
        try:
            numbers = tracker.first, tracker.last
            tracker.annotate(describe.outcome(run, status, resumable, *numbers, tracker.store))
            tracker.finish(status, clock.seconds, resumable)
        except Exception as error:
            if status != "FINISHED":  # what goes wrong with that does not hide what ended it
                log.warning("%s: that it is %s could not be written (%s)", run.folder, status, error)
            elif disk.is_full(error):
                raise disk.disk_full(error, run.folder) from error
            else:
                raise


class Clock:
    """Seconds spent per part of a run."""

    def __init__(self) -> None:
        self.seconds, self.began = dict[str, float](), time.monotonic()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under ``name``."""
        spent = time.monotonic() - self.began - sum(v for k, v in self.seconds.items() if k != "total")
        self.seconds[name] = round(spent, 3)
        self.seconds["total"] = round(time.monotonic() - self.began, 3)
