"""``train -m``: the jobs of a sweep under one parent.

1. `planned`: the sweep's folder; that of the same sweep issued before, if there is one.
2. `recorded`: the parent in MLflow before the first job; table, charts and its true status after the last.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlmx.comparison import page, plots
from mlmx.comparison.ranking import Table, tabulate
from mlmx.comparison.text import csv_text, markdown, plain
from mlmx.config.errors import RequestError, brief, require
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
from mlmx.tracking.store import Store, found_runs, reason

log = logging.getLogger("mlmx")


@dataclass(frozen=True)
class Plan:
    """A sweep that is about to run.

    Attributes:
        swept: what stands behind each swept key on the command line or in the config: ``{"lr": "2e-5,5e-5"}``.
        jobs: how many; 0 where only the sweeper knows.
    """

    sweep: Sweep
    name: str
    command: str
    identity: str
    swept: Mapping[str, str]
    jobs: int
    note: str | None
    store: Store | None


def planned(
    cfg: TrainConfig, command: str, fixed: Sequence[str], swept: Mapping[str, str], jobs: int, folder: Path, named: bool
) -> Plan:
    """Where a sweep is to run.

    Args:
        cfg: that of any of its jobs.
        fixed: the overrides that are the same for all jobs, those of Hydra's node left out.
        folder: Hydra's.
        named: the command named the folder.

    Raises:
        RequestError: the named folder holds another sweep, or a run.
    """
    without_effect = tuple(f"{key}{end}" for key in identity.WITHOUT_EFFECT for end in ("=", "."))
    same = sorted(override for override in fixed if not override.lstrip("+").startswith(without_effect))
    key = identity.fingerprint({"fixed": same, "swept": sorted(swept)})
    known = [Sweep(folder)] if named else list(reversed(all_sweeps()))
    before = next((sweep for sweep in known if sweep.about().identity == key), None)
    if before is not None and (cfg.sweep.reuse or named):
        require(cfg.sweep.reuse, f"sweep.reuse=false: {folder} holds this sweep; leave out hydra.sweep.dir")
        folder = before.folder
    elif (folder / SweepRecord.FILE).exists() or (folder / "config.yaml").exists():
        raise RequestError(f"hydra.sweep.dir={folder}: holds another sweep or run; choose another folder")
    name = f"{cfg.run_name or 'sweep'} · {' × '.join(swept) or 'one job'}"
    return Plan(Sweep(folder), name, command, key, swept, jobs, cfg.note, parts_of(cfg).store)


@contextlib.contextmanager
def recorded(plan: Plan) -> Iterator[None]:
    """Inside the block the jobs run; the sweep's record is made before and ends truthfully, whatever ends the block.

    Raises:
        RequestError: another process is at this sweep.
    """
    with log_to(), process.held(plan.sweep.folder):
        mark_dead()
        again = (plan.sweep.folder / SweepRecord.FILE).exists()
        started = plan.sweep.about().started or milliseconds()
        facts = {"name": plan.name, "command": plan.command, "identity": plan.identity, "started": started}
        counts = {"swept": dict(plan.swept), "jobs": max(plan.jobs, len(plan.sweep.folders()))}
        plan.sweep.note(**facts, **counts, status=Status.RUNNING, ended=None)
        log.info("%s", _introduction(plan, again))
        parent = _opened(plan)
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


def _introduction(plan: Plan, again: bool) -> str:
    what = f"{plan.jobs} jobs" if plan.jobs else "a search"
    lines = [f"sweep    {what} over {', '.join(plan.swept) or 'nothing'}", f"folder   {plan.sweep.folder}"]
    if again:
        states = [str(run.status).lower() for run in plan.sweep.runs()]
        listed = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "nothing yet"
        lines.append(f"again    of an earlier issue: {listed}; sweep.reuse=false begins anew")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- the parent


def _opened(plan: Plan) -> Mirror | None:
    """The parent's MLflow run, made or opened again, so that the store is there before the jobs are."""
    if plan.store is None:
        return None
    mirror = Mirror(Run(plan.sweep.folder), plan.store)
    try:
        _write_record(plan, "The jobs are running.")
        mirror.update()
    except Exception as error:  # noqa: BLE001 (of many kinds, from MLflow's and its database's)
        why = reason(error, plan.store)
        log.warning("MLflow does not take the sweep (%s); it goes on without its parent there", why)
    return mirror


def _write_record(plan: Plan, state: str, table: Table | None = None, ended: int | None = None) -> None:
    """What makes the parent's MLflow run, with a description of how the sweep stands."""
    home = Run(plan.sweep.folder)
    own = {"mlmx.folder": str(home.folder), **provenance.tags()}
    record = record_of(home) or MlflowRecord(plan.name, own, started=milliseconds())
    swept = {"mlmx.command": plan.command, "mlmx.swept": ", ".join(plan.swept)}
    tags = record.tags | provenance.process_tags() | swept
    if table is not None and table.best is not None:
        tags |= {"mlmx.best": str(table.best.run.result().run_id), "mlmx.best_name": table.best.name}
    record = renoted(replace(record, tags=redacted(tags), ended=ended), redact(_note(plan, state, table)))
    records.write(record, home.folder)


def _end(plan: Plan, status: Status, parent: Mirror | None) -> None:
    """Table, charts, best job and status, in the folder and in MLflow; what goes wrong does not hide how it ended."""
    try:
        table = tabulate(plan.sweep.runs(), keys=list(plan.swept), failures=failures(plan.sweep))
        best = str(table.best.run.folder) if table.best else None
        plan.sweep.note(status=status, ended=milliseconds(), best=best)
        _written(plan, table)
        log.info("%s", plain(table))
        log.info("%s", _ending(plan, table, status))
    except Exception as error:  # noqa: BLE001 (of whatever kind: it does not hide how the sweep ended)
        log.warning("%s: its table could not be made (%s)", plan.sweep.folder, brief(error))
        with contextlib.suppress(OSError):
            plan.sweep.note(status=status, ended=milliseconds())
        table = None
    if parent is None:
        return
    try:
        _write_record(plan, f"Ended {status}.", table, ended=milliseconds())
        parent.changed = True
        parent.update()
        _send_best(parent, table)
        adopt(parent, plan.sweep)
    except Exception as error:  # noqa: BLE001 (of many kinds, from MLflow's and its database's)
        log.warning("MLflow did not get how the sweep ended (%s); all of it is in %s", brief(error), plan.sweep.folder)


def _written(plan: Plan, table: Table) -> None:
    folder = plan.sweep.folder
    home = Run(folder)
    with writing(folder):
        home.plots.mkdir(exist_ok=True)
        drawn = [*plots.plot_table(table, home.plots), *search.plot(folder, home.plots)]
        home.write_text("table.md", markdown(table))
        home.write_text("table.csv", csv_text(table))
        home.write_text("report.html", page.report(table, plan.name, drawn))


def adopt(parent: Mirror, sweep: Sweep) -> None:
    """Jobs of which MLflow does not know the parent, or how they ended, are brought as their folders say."""
    assert parent.mlflow is not None
    mlflow = parent.mlflow
    known = found_runs(mlflow.client, f"tags.`{PARENT}` = '{mlflow.run_id}'")
    ended = {one.info.run_id: one.info.status for one in known}
    for run in sweep.runs():
        record = record_of(run)
        if record is None or ended.get(record.run_id) == run.status:
            continue
        if record.tags.get(PARENT) != mlflow.run_id:
            own = replace(record, tags=record.tags | {PARENT: mlflow.run_id})
            records.write(own, run.folder)
        with process.unless_held(run.folder) as is_free:
            if is_free:
                update(run, parent.store)


def _send_best(parent: Mirror, table: Table | None) -> None:
    """The losses of the best job, as the parent's own."""
    assert parent.mlflow is not None
    for name in ("heldout/loss", "eval/loss"):
        if table is not None and table.best is not None and name in table.best.metrics:
            best = table.best.metrics[name]
            parent.mlflow.client.log_metric(parent.mlflow.run_id, f"best/{name.replace('/', '_')}", best)


# ---------------------------------------------------------------------------------------------- speech


def _note(plan: Plan, state: str, table: Table | None) -> str:
    lines = [f"`{plan.command}`", *([plan.note] if plan.note else []), state]
    if table is not None and table.best is not None:
        run_id = table.best.run.result().run_id
        lines.append(f"Best: {table.best.name}" + (f" (run `{run_id}`)" if run_id else ""))
    if table is not None:
        lines.append(markdown(table))
    return "\n\n".join([*lines, "The same command again keeps what is done and goes on with the rest."])


def _ending(plan: Plan, table: Table, status: Status) -> str:
    lines = [f"sweep    {status.lower()}: {len(table.rows)} jobs in {plan.sweep.folder}"]
    if table.best is not None:
        lines.append(f"best     {table.best.name}: {table.best.run.folder}")
    if status != Status.FINISHED:
        lines.append("go on    give the same command again: what is done is kept")
    lines.append(f"compare  python -m mlmx compare sweep={plan.sweep.folder}")
    return "\n".join(lines)
