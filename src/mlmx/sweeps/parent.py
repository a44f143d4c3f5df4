"""``train -m``: the jobs of a sweep under one parent.

1. `planned`: the sweep's folder; that of the same sweep issued before, if there is one.
2. `recorded`: the parent in MLflow before the first job; table, charts and its true status after the last.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlmx.comparison import page, plots
from mlmx.comparison.ranking import Table, tabulate
from mlmx.comparison.text import csv_text, markdown, plain
from mlmx.config import own_files
from mlmx.config.errors import RequestError, brief, require
from mlmx.config.own_files import Files
from mlmx.config.redaction import redact, redacted
from mlmx.config.schema import TrainConfig
from mlmx.experiment import parts_of
from mlmx.runs import identity, process, provenance, records, signals
from mlmx.runs.disk import writing
from mlmx.runs.log import log_to
from mlmx.runs.provenance import PARENT
from mlmx.runs.records import MlflowRecord, Status, SweepRecord, milliseconds
from mlmx.runs.run import Run
from mlmx.sweeps import search
from mlmx.sweeps.sweep import Sweep, all_sweeps, mark_dead
from mlmx.tracking.mirror import Mirror, record_of, renoted, update
from mlmx.tracking.store import Store, found_runs, reason, store_of

log = logging.getLogger("mlmx")


@dataclass(frozen=True)
class Plan:
    """A sweep that is about to run."""

    sweep: Sweep
    name: str
    command: str
    identity: str
    swept: Mapping[str, str]  # what stands behind each swept key: ``{"lr": "2e-5,5e-5"}``
    jobs: int  # how many; 0 where only the sweeper knows
    note: str | None
    store: Store | None


def planned(
    cfg: TrainConfig,  # of any of its jobs
    given: Sequence[str],  # the overrides as they stood on the command line
    fixed: Sequence[str],  # those that are the same for all jobs, without those of Hydra's node
    swept: Mapping[str, str],
    jobs: int,
    folder: Path,  # Hydra's
    own: Files,  # YAML of the user's own, of which the sweep keeps copies
) -> Plan:
    """Where a sweep is to run, in a folder that is known before Hydra makes it; refused where it holds another."""
    without_effect = tuple(f"{key}{end}" for key in identity.WITHOUT_EFFECT for end in ("=", "."))
    same = sorted(override for override in fixed if not override.lstrip("+").startswith(without_effect))
    key = identity.fingerprint({"fixed": same, "swept": sorted(swept)})
    named = any(override.startswith("hydra.sweep.dir=") for override in given)
    known = [Sweep(folder)] if named else list(reversed(all_sweeps()))
    before = next((sweep for sweep in known if sweep.about().identity == key), None)
    if before is not None and (cfg.sweep.reuse or named):
        require(cfg.sweep.reuse, f"sweep.reuse=false: {folder} holds this sweep; leave out hydra.sweep.dir")
        folder = before.folder
    elif (folder / SweepRecord.FILE).exists() or (folder / "config.yaml").exists():
        raise RequestError(f"hydra.sweep.dir={folder}: holds another sweep or run; choose another folder")
    name = f"{cfg.run_name or 'sweep'} · {' × '.join(swept) or 'one job'}"
    flags = ["--config-dir", str(folder / own_files.FOLDER)] if own else []
    command = shlex.join(["python", "-m", "mlmx", "train", "-m", *flags, *given])
    return Plan(Sweep(folder), name, command, key, swept, jobs, cfg.note, parts_of(cfg).store)


@contextlib.contextmanager
def recorded(plan: Plan) -> Iterator[None]:
    """Inside the block the jobs run; the sweep's record is made before and ends truthfully, whatever ends the block."""
    folder = plan.sweep.folder
    with log_to(), process.held(folder):
        mark_dead()
        again = (folder / SweepRecord.FILE).exists()
        started = plan.sweep.about().started or milliseconds()
        facts = {"name": plan.name, "command": plan.command, "identity": plan.identity, "started": started}
        counts = {"swept": dict(plan.swept), "jobs": max(plan.jobs, len(plan.sweep.folders()))}
        plan.sweep.note(**facts, **counts, status=Status.RUNNING, ended=None)
        what = f"{plan.jobs} jobs" if plan.jobs else "a search"
        log.info("sweep    %s over %s\nfolder   %s", what, ", ".join(plan.swept) or "nothing", folder)
        if again:
            states = Counter(str(run.status).lower() for run in plan.sweep.runs())
            listed = ", ".join(f"{number} {state}" for state, number in states.items()) or "nothing yet"
            log.info("again    of an earlier issue: %s; sweep.reuse=false begins anew", listed)
        parent = None if plan.store is None else Mirror(Run(folder), plan.store)
        if parent is not None:  # made or opened again, so that the store is there before the jobs are
            try:
                _write_record(plan, "The jobs are running.")
                parent.update()
            except Exception as error:  # noqa: BLE001 (of many kinds, from MLflow's and its database's)
                why = reason(error, parent.store)
                log.warning("MLflow does not take the sweep (%s); it goes on without its parent there", why)
        status = Status.FAILED
        try:
            yield
            status = Status.FAILED if failures(plan.sweep) else Status.FINISHED
        except (signals.Interrupted, KeyboardInterrupt, SystemExit) as error:
            status = Status.KILLED
            error.add_note("to go on, give the same command again")
            raise
        finally:
            _end(plan, status, parent)


def failures(sweep: Sweep) -> dict[Path, str]:
    """Why jobs failed, by folder."""
    return {job.folder: job.about.error or "failed" for job in sweep.jobs() if job.failed}


def _write_record(plan: Plan, state: str, table: Table | None = None, ended: int | None = None) -> None:
    """What makes the parent's MLflow run, with a description of how the sweep stands."""
    home = Run(plan.sweep.folder)
    own = {"mlmx.folder": str(home.folder), **provenance.tags()}
    record = record_of(home) or MlflowRecord(plan.name, own, started=milliseconds())
    swept = {"mlmx.command": plan.command, "mlmx.swept": ", ".join(plan.swept)}
    tags = record.tags | provenance.process_tags() | swept
    note = [f"`{plan.command}`", *([plan.note] if plan.note else []), state]
    if table is not None and table.best is not None:
        run_id = table.best.run.result().run_id
        tags |= {"mlmx.best": str(run_id), "mlmx.best_name": table.best.name}
        note.append(f"Best: {table.best.name}" + (f" (run `{run_id}`)" if run_id else ""))
    if table is not None:
        note.append(markdown(table))
    note.append("The same command again keeps what is done and goes on with the rest.")
    record = renoted(replace(record, tags=redacted(tags), ended=ended), redact("\n\n".join(note)))
    records.write(record, home.folder)


def _end(plan: Plan, status: Status, parent: Mirror | None) -> None:
    """Table, charts, best job and status, in the folder and in MLflow; what goes wrong does not hide how it ended."""
    home, table, best = Run(plan.sweep.folder), None, None
    try:
        table = tabulate(plan.sweep.runs(), keys=list(plan.swept), failures=failures(plan.sweep))
        best = table.best
        plan.sweep.note(status=status, ended=milliseconds(), best=str(best.run.folder) if best else None)
        with writing(home.folder):
            home.plots.mkdir(exist_ok=True)
            drawn = [*plots.plot_table(table, home.plots), *search.plot(home.folder, home.plots)]
            home.write_text("table.md", markdown(table))
            home.write_text("table.csv", csv_text(table))
            home.write_text("report.html", page.report(table, plan.name, drawn))
        log.info("%s", plain(table))
        log.info("sweep    %s: %d jobs in %s", status.lower(), len(table.rows), home.folder)
        if best is not None:
            log.info("best     %s: %s", best.name, best.run.folder)
        if status != Status.FINISHED:
            log.info("go on    give the same command again: what is done is kept")
        log.info("compare  python -m mlmx compare sweep=%s", home.folder)
    except Exception as error:  # noqa: BLE001 (of whatever kind: it does not hide how the sweep ended)
        log.warning("%s: its table could not be made (%s)", home.folder, brief(error))
        with contextlib.suppress(OSError):
            plan.sweep.note(status=status, ended=milliseconds())
        table = best = None
    if parent is None:
        return
    try:
        _write_record(plan, f"Ended {status}.", table, ended=milliseconds())
        parent.changed = True
        parent.update()
        assert parent.mlflow is not None
        mlflow = parent.mlflow
        for name in ("heldout/loss", "eval/loss"):  # of the best job, as the parent's own
            if best is not None and name in best.metrics:
                key = f"best/{name.replace('/', '_')}"
                mlflow.client.log_metric(mlflow.run_id, key, best.metrics[name])
        adopt(parent, plan.sweep)
    except Exception as error:  # noqa: BLE001 (of many kinds, from MLflow's and its database's)
        log.warning("MLflow did not get how the sweep ended (%s); all of it is in %s", brief(error), home.folder)


def adopt(parent: Mirror, sweep: Sweep) -> None:
    """Jobs of which MLflow does not know the parent, or how they ended, are brought as their folders say."""
    assert parent.mlflow is not None
    mlflow = parent.mlflow
    known = found_runs(mlflow.client, f"tags.`{PARENT}` = '{mlflow.run_id}'")
    ended = {one.info.run_id: one.info.status for one in known}
    for run in sweep.runs():
        record, store = record_of(run), store_of(run)
        if record is None or ended.get(record.run_id) == run.status:
            continue
        if store is None or store.uri != parent.store.uri:  # made when the sweep was tracked elsewhere, or not at all
            continue
        try:
            if record.tags.get(PARENT) != mlflow.run_id:
                records.write(replace(record, tags=record.tags | {PARENT: mlflow.run_id}), run.folder)
            with process.unless_held(run.folder) as is_free:
                if is_free:
                    update(run, store)
        except Exception as error:  # noqa: BLE001 (of many kinds, from MLflow's and its database's)
            log.warning("MLflow did not get all of %s (%s)", run.folder, brief(error))
