"""``doctor``: what became of runs that have not finished; what is dead is marked so, here and in MLflow."""

from __future__ import annotations

import logging
import shlex
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from mlmx.config.errors import brief
from mlmx.config.paths import outputs_dir
from mlmx.config.schema import DoctorConfig, Job
from mlmx.runs import checkpoints, process, provenance
from mlmx.runs.disk import RESERVE_FILE
from mlmx.runs.log import log_to
from mlmx.runs.records import ProcessRecord, Status, SweepRecord, parsed
from mlmx.runs.run import Run, all_runs
from mlmx.sweeps.sweep import Sweep, all_sweeps, mark_dead
from mlmx.tracking.mirror import record_of, update
from mlmx.tracking.store import Store, bound_store, connect, found_runs, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

log = logging.getLogger("mlmx")
HALF_WRITTEN = (".*.tmp", "checkpoints/.*.tmp", RESERVE_FILE)  # in a run's folder


def check(cfg: DoctorConfig) -> None:
    """The store is a store."""
    bound_store(cfg.tracking)


def doctor(cfg: DoctorConfig, job: Job) -> None:
    """Look after every run below outputs/train, the token cache and the MLflow store."""
    with log_to():
        dead = process.mark_dead()
        mark_dead()
        found = all_runs()
        counts = Counter(str(run.status).lower() for run in found)
        listed = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
        log.info("runs     %s below %s", listed or "none", outputs_dir() / "train")
        for run in found:
            if run.status == Status.FINISHED:
                continue
            log.info("%s", describe(run, run in dead))
            with process.unless_held(run.folder) as is_free:
                if is_free and not process.is_alive(run):
                    for path in sorted(path for pattern in HALF_WRITTEN for path in run.folder.glob(pattern)):
                        _remove(path)
        for sweep in all_sweeps():
            about = sweep.about()
            if about.status in (Status.KILLED, Status.FAILED):
                again = f"the same command keeps what is done: {about.command}"
                log.info("%-9s%s: a sweep; %s", about.status.lower(), sweep.folder, again)
        quiet = time.time() - process.SILENCE_SECONDS  # tokens of the last minutes may still be being written
        for half in sorted((outputs_dir() / "cache").glob(".*.tmp")):
            if max(path.stat().st_mtime for path in (half, *half.rglob("*"))) < quiet:
                _remove(half)
        settle(bound_store(cfg.tracking))


def describe(run: Run, found_dead: bool) -> str:
    """A line on a run that has not finished: whether it lives, or the command that goes on with it, and from where."""
    who, status = process.process_of(run), str(run.status).lower()
    at_it = f"process {who.pid} on {who.host}" if who.pid and who.host else "its process"
    if process.is_alive(run):
        heard = f"since {who.started}, last heard {process.heard_seconds_ago(run):.0f} s ago"
        return f"{status:<9}{run.folder}: {at_it} is at it {heard}"
    then = "it had not begun; nothing is lost with its folder"
    if (run.folder / "config.yaml").is_file():
        # A checkpoint is verified when it is loaded, not here.
        saved = (at.name for at in checkpoints.all_of(run.checkpoints) if (at / checkpoints.MANIFEST).is_file())
        begin = next(saved, "its start, for it has no checkpoint")
        then = f"go on from {begin}: python -m mlmx train resume={shlex.quote(str(run.folder))}"
    if found_dead:
        then = f"{at_it} is gone, marked KILLED; {then}"
    return f"{status:<9}{run.folder}: {then}"


def _remove(path: Path) -> None:
    """What a process that was killed while writing left behind."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    log.info("removed  %s", path)


def settle(store: Store | None) -> None:
    """Tell MLflow how runs ended of which it still says RUNNING."""
    if store is None or (store.artifacts is not None and not (store.artifacts.parent / "mlflow.db").exists()):
        return
    try:
        client, _ = connect(store)
        found = found_runs(client, "attributes.status = 'RUNNING'")
    except Exception as error:  # noqa: BLE001 (of many kinds, from MLflow's and its database's)
        log.warning("mlflow   %s cannot be looked at (%s)", store.uri, reason(error, store))
        return
    for one in found:
        try:
            _settle(one, store, client)
        except Exception as error:  # noqa: BLE001 (of many kinds, from MLflow's and its database's)
            log.warning("mlflow   run %s cannot be set right now (%s)", one.info.run_id, brief(error))


def _settle(one: MlflowRun, store: Store, client: MlflowClient) -> None:
    home = Run(Path(one.data.tags.get("mlmx.folder", "")))
    run_id, started = one.info.run_id, one.info.start_time
    record = record_of(home)
    # A process may have been killed before it knew the id.
    if record is not None and (record.run_id == run_id or (record.run_id is None and record.started == started)):
        is_sweep = (home.folder / SweepRecord.FILE).is_file()
        status = Sweep(home.folder).about().status if is_sweep else home.status
        if status is not None and status.is_end:
            update(home, store)
            what = "sweep" if is_sweep else "run"
            log.info("mlflow   %s %s of %s said RUNNING, is %s now", what, run_id, home.folder, status)
    elif is_over(one):
        client.set_terminated(run_id, "KILLED")
        log.info("mlflow   run %s said RUNNING, is KILLED now; its process and its folder are gone", run_id)


def is_over(one: MlflowRun) -> bool:
    """Whether an MLflow run's process was one of this machine and is no more, as far as its tags tell."""
    here = provenance.process()
    who = parsed(ProcessRecord, {tag.removeprefix("mlmx."): text for tag, text in one.data.tags.items()})
    if who.host != here.host:
        return False
    if process.is_gone(who, here):
        return True
    if who.boot_id is not None:
        return who.boot_id != here.boot_id
    booted = provenance.boot_time()  # of a system that does not tell which boot it was
    return booted is not None and one.info.start_time / 1000 < booted
