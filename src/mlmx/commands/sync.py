"""``sync``: send to MLflow what it did not get of runs that have ended."""

from __future__ import annotations

import logging

from mlmx.config.errors import RequestError, WorkError
from mlmx.config.schema import Job, SyncConfig
from mlmx.runs import process
from mlmx.runs.log import log_to
from mlmx.runs.run import Run, all_runs, any_run
from mlmx.tracking.mirror import update
from mlmx.tracking.store import Store, bound_store, reason, store_of

log = logging.getLogger("mlmx")


def check(cfg: SyncConfig) -> None:
    """There is something to send, and somewhere to send it."""
    for run in meant(cfg):
        if cfg.run != "all" and not (bound_store(cfg.tracking) if cfg.tracking else store_of(run)):
            where = "say where to send it: tracking=local, or tracking=server tracking.uri=…"
            raise RequestError(f"run={cfg.run}: was made with tracking=none; {where}")


def meant(cfg: SyncConfig) -> list[Run]:
    """The runs to send; with ``all`` those that have ended, of whatever else there is."""
    if cfg.run == "all":
        return [run for run in all_runs() if not process.is_alive(run)]
    run = any_run(cfg.run)
    if process.is_alive(run):
        raise RequestError(f"run={cfg.run}: is being trained and sends its numbers itself; sync it when it ends")
    return [run]


def sync(cfg: SyncConfig, job: Job) -> None:
    """A line per run: what was missing in MLflow and is there now.

    Raises:
        WorkError: MLflow did not take one of them; the others are there.
    """
    with log_to():
        process.mark_dead()
        found = meant(cfg)
        failed: list[str] = []
        away: set[str] = set()  # a store that does not answer is asked once
        for run in found:
            store = bound_store(cfg.tracking) if cfg.tracking else store_of(run)
            if store is None:
                continue
            try:
                if store.uri in away:
                    raise WorkError(f"{run.folder}: {store.uri} is away")
                log.info("%s: %s", run.folder, sent(run, store))
            except WorkError as error:
                failed.append(str(error))
                away |= {store.uri} if is_away(error) else set()
                if len(found) > 1:
                    log.warning("%s", error)
    if failed:
        what = failed[0] if len(found) == 1 else f"{len(failed)} of {len(found)} runs were not sent"
        raise WorkError(f"{what}; nothing is lost, run the command again")


def sent(run: Run, store: Store) -> str:
    """``3 points, 1 model sent to http://…``; `WorkError` where MLflow did not take it."""
    with process.unless_held(run.folder) as is_free:  # two at once would make two MLflow runs
        if not is_free:
            raise WorkError(f"{run.folder}: is in use by another process")
        try:
            missing = update(run, store, own=store == store_of(run))
        except RequestError as error:
            return str(error)
        except Exception as error:
            raise WorkError(f"{run.folder}: {store.uri} did not take it ({reason(error, store)})") from error
    counts = ", ".join(f"{count:,} {what if count > 1 else what[:-1]}" for what, count in missing.items() if count)
    return f"{counts} sent to {store.uri}" if counts else f"{store.uri} has all of it"


def is_away(error: BaseException | None) -> bool:
    """Whether it is the connection that failed, not the run."""
    while error is not None:
        if isinstance(error, OSError) and error.filename is None:
            return True
        error = error.__cause__ or error.__context__
    return False
