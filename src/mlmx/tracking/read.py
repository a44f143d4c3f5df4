"""Runs of an MLflow store as run folders, for whoever has only the store."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlmx.config.errors import RequestError, WorkError, brief, did_you_mean, require
from mlmx.runs import records
from mlmx.runs.provenance import PARENT
from mlmx.runs.records import MlflowRecord, Status
from mlmx.runs.run import HELDOUT_FILE, Run
from mlmx.tracking.store import Store, client_of, experiments_of, found_runs, trouble

if TYPE_CHECKING:
    from mlflow import MlflowClient, entities

FILES = ("config.yaml", "overrides.yaml", "data.json", "result.json", HELDOUT_FILE)
CURVES = ("heldout/loss", "eval/loss", "epoch")  # whose histories are read; of other metrics the last value
MOST_BYTES = 100_000_000  # of a file


def fetch(store: Store, folder: Path, *, run_ids: Sequence[str] = (), parent: str | None = None) -> list[Run]:
    """Runs with their params, histories and small files, each as a folder below ``folder``, oldest first: these, or the
    jobs of ``parent``, the run of a sweep, or those of the store's experiment.

    `RequestError` where there is no such run or experiment, `WorkError` where the store does not answer.
    """
    if path := store.database:
        require(path.exists(), f"tracking=local: no MLflow store at {path} yet; train something first")
        if wrong := trouble(store):  # MLflow would try long, or migrate it
            raise WorkError(wrong)
    client = client_of(store)
    try:
        if run_ids:
            found = [_run(client, store, run_id) for run_id in dict.fromkeys(run_ids)]
        elif parent:
            require(re.fullmatch(r"[\w-]+", parent) is not None, f"sweep={parent}: is no MLflow run id")
            found = found_runs(client, f"tags.`{PARENT}` = '{parent}'")
        else:
            there, name = experiments_of(client), store.experiment
            known = f"{did_you_mean(name, there)} (it has: {', '.join(there) or 'none'})"
            require(name in there, f"experiment={name}: {store.uri} has no such experiment{known}")
            found = found_runs(client, "", [there[name]])
            parents = {run.data.tags.get(PARENT) for run in found}
            found = [run for run in found if run.info.run_id not in parents]
        ids = [re.sub(r"\W", "_", run.info.run_id)[:64] for run in found]  # what a server calls its runs is no path
        short = [one[:8] for one in ids]
        folders = [folder / one for one in (short if len(set(short)) == len(ids) else ids)]
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(partial(_as_folder, client), found, folders))
    except (RequestError, WorkError):
        raise
    except Exception as error:  # of many kinds, from MLflow's and the network's
        raise WorkError(f"{store.uri}: cannot be read ({trouble(store) or brief(error)})") from error


def _run(client: MlflowClient, store: Store, run_id: str) -> entities.Run:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise RequestError(f"runs={run_id}: is no run folder, and {store.uri} has no run of this id") from error


def _as_folder(client: MlflowClient, run: entities.Run, folder: Path) -> Run:
    folder.mkdir(parents=True)
    made, run_id = Run(folder), run.info.run_id
    for artifact in client.list_artifacts(run_id):
        if artifact.path in FILES and (artifact.file_size or 0) <= MOST_BYTES:
            client.download_artifacts(run_id, artifact.path, str(folder))
    if not (folder / "config.yaml").is_file():  # its artifacts are elsewhere: the dials that are params
        made.write_text("config.yaml", json.dumps({key: _number(text) for key, text in run.data.params.items()}))
    result = made.result()
    last = {name: _unbounded(value) for name, value in run.data.metrics.items() if name != "epoch"}
    result.run_id, result.run_name, result.protocol = run_id, run.info.run_name, run.data.tags.get("mlmx.protocol")
    result.status, result.metrics = Status(run.info.status), result.metrics | last  # MLflow refuses some names
    records.write(result, folder)
    records.write(MlflowRecord(params=dict(run.data.params)), folder)
    rows: dict[int, dict[str, Any]] = {}
    for name in CURVES:
        for point in client.get_metric_history(run_id, name) if name in run.data.metrics else ():
            rows.setdefault(point.step, {"step": point.step})[name] = _unbounded(point.value)
    made.write_text("metrics.jsonl", "".join(json.dumps(rows[step]) + "\n" for step in sorted(rows)))
    return made


def _number(text: str) -> int | float | str:
    """A param as the number it is written as, if it is one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _unbounded(value: float) -> float:
    """Databases keep the largest number for infinity."""
    return value if abs(value) < sys.float_info.max else value * 2
