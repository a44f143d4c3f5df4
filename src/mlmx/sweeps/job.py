"""One job of a sweep: nothing where its run is done, go on where it was interrupted, else train.

Decided where the job runs, from what lies in the sweep's folder: so it is the same for every launcher and sweeper.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlmx.config.compose import key_of
from mlmx.config.redaction import show_traceback
from mlmx.config.schema import Job, Resume, TrainConfig
from mlmx.experiment import parts_of, texts_sha256
from mlmx.runs import identity, process, provenance, records, signals
from mlmx.runs.explain import explain
from mlmx.runs.log import log_to
from mlmx.runs.metrics_file import loss_of
from mlmx.runs.records import JobRecord, SplitRecord, Status
from mlmx.runs.run import Run, discard_empty
from mlmx.sweeps.sweep import Sweep, SweepJob
from mlmx.tracking.mirror import record_of

if TYPE_CHECKING:
    from mlmx.training.callbacks import StopEarly

log = logging.getLogger("mlmx")
Train = Callable[[TrainConfig, Job, "StopEarly | None"], float]


def run_job(cfg: TrainConfig, job: Job, number: int, train: Train, stop_early: StopEarly | None = None) -> float:
    """The run of a job of a sweep; returns its last ``heldout/loss``, NaN where it failed: the others go on.

    ``job`` comes with the sweep's folder and the one that Hydra has made for it; ``number`` is Hydra's; ``train`` makes
    a run and returns its last ``heldout/loss``.
    """
    assert job.sweep is not None
    if os.environ.get("RANK", "0") != "0":  # of several processes one keeps the record
        return train(cfg, job, stop_early)
    with log_to(), contextlib.ExitStack() as where:
        try:
            if signals.is_worker():
                where.enter_context(signals.in_worker())
            return _run_job(cfg, job, Sweep(job.sweep), number, train, stop_early)
        except signals.Interrupted:
            if not signals.is_worker():
                raise
            return math.nan  # raised, it would have the launcher end other jobs before they are saved


def _run_job(
    cfg: TrainConfig, job: Job, sweep: Sweep, number: int, train: Train, stop_early: StopEarly | None
) -> float:
    dials = identity.fingerprint(identity.dials(cfg))
    key = identity.fingerprint(dials, provenance.code_version())
    folder, what = None, " ".join(override for override in job.overrides if key_of(override) in sweep.about().swept)
    try:
        before = earlier(sweep, cfg, key)
        done = before is not None and before.run.status == Status.FINISHED
        log.info("\njob %-5d%s%s", number, what, " is done" if done else "")
        if before is not None and done:
            discard_empty(job.folder)
            return loss_of(before.run.result().metrics)
        folder = before.folder if before is not None else sweep.free_folder(job.folder)
        if folder != job.folder:
            discard_empty(job.folder)
        records.write(JobRecord(key, dials, list(identity.without_resume(job.overrides))), folder)
        resumed = Resume(str(folder)) if (folder / "config.yaml").is_file() else cfg.resume
        parent = record_of(Run(sweep.folder))
        job = replace(job, folder=folder, parent=parent.run_id if parent else None)
        return train(replace(cfg, resume=resumed), job, stop_early)
    except signals.Interrupted as error:
        if folder is not None and signals.is_worker():  # the sweep may not have been asked to end, and has to know
            _fail(folder, str(error))
        raise
    except Exception as error:  # noqa: BLE001 (whatever it was, the other jobs go on)
        error.add_note(f"job {number} of the sweep ({what})")
        _, line = explain(error, "train")
        _fail(folder or sweep.free_folder(job.folder), line)
        if os.environ.get("MLMX_DEBUG"):
            show_traceback(type(error), error, error.__traceback__)
        print(f"mlmx: {line}", file=sys.stderr)
        return math.nan


def _fail(folder: Path, error: str) -> None:
    records.write(replace(records.read(JobRecord, folder) or JobRecord(), error=error), folder)


def earlier(sweep: Sweep, cfg: TrainConfig, key: str) -> SweepJob | None:
    """The job of an earlier issue of the sweep whose run is this very one, on the same texts; the dead are marked."""
    found = next((one for one in sweep.jobs() if one.about.key == key), None) if cfg.sweep.reuse else None
    if found is None or not (found.folder / SplitRecord.FILE).is_file():
        return found  # nothing of it can be of other texts
    process.mark_dead()
    before, now = records.read_splits(found.folder), texts_sha256(parts_of(cfg))
    return found if {name: before.get(name, SplitRecord()).content_sha256 for name in now} == now else None
