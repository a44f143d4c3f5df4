"""One run in an MLflow store, through the client API: no global state, no exit handlers."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from filelock import FileLock

if TYPE_CHECKING:
    from mlmx.tracking import Store

# Before MLflow is imported: nothing is sent to its makers or printed, and a call that fails does so in seconds and
# only once, for the writer tries again itself.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # failures are said by the writer, without a traceback


import mlflow.entities as entities
from mlflow import MlflowClient

# What makes a checkpoint loadable; the optimizer, scheduler and random states are for resuming, and stay local.
NOT_THE_MODEL = ("optimizer.safetensors", "trainer_state.json", "state.json", "manifest.json")


class MlflowRun:
    """An open run; every method raises what the store raises.

    Args:
        started: milliseconds since 1970.
        again: the run was asked for before and may be there, though no answer came; then it is found, not made twice.
    """

    def __init__(
        self, client: MlflowClient, experiment: str, name: str, tags: dict[str, str], started: int, again: bool
    ) -> None:
        self.client = client
        same = client.search_runs([experiment], f"attributes.start_time = {started}") if again else []
        mine = [run for run in same if run.data.tags.get("mlmx.folder") == tags.get("mlmx.folder")]
        run = mine[0] if mine else client.create_run(experiment, started, tags, name)
        self.run_id: str = run.info.run_id
        artifacts = urlparse(run.info.artifact_uri)
        # Files of a local store are linked, not copied: a checkpoint takes its space once.
        self.local_artifacts = Path(url2pathname(artifacts.path)) if artifacts.scheme in ("", "file") else None

    def describe(self, params: Mapping[str, Any], report: Mapping[str, Mapping[str, Any]]) -> None:
        """The dials, and the splits of the data report as datasets."""
        self.client.log_batch(self.run_id, params=[entities.Param(key, str(value)) for key, value in params.items()])
        contexts = {"train": "training", "eval": "validation", "heldout": "testing"}
        inputs = [_dataset_input(report[name], name, context) for name, context in contexts.items() if name in report]
        self.client.log_inputs(self.run_id, inputs)

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of metrics.jsonl as points, each at its own step and time; the epoch is a metric as well."""
        points = []
        for row in rows:
            milliseconds = int(datetime.fromisoformat(row["time"]).timestamp() * 1000)
            values = {name: value for name, value in row.items() if name not in ("step", "time")}
            points += [entities.Metric(name, value, milliseconds, row["step"]) for name, value in values.items()]
        self.client.log_batch(self.run_id, metrics=points)

    def ping(self) -> None:
        """Raises where MLflow is away."""
        self.client.get_run(self.run_id)

    def add_model(self, folder: Path, name: str) -> None:
        """A saved model's folder as artifact ``name``, without what only resuming needs."""
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name not in NOT_THE_MODEL:
                self.add_file(path, name)

    def add_file(self, path: Path, folder: str | None = None) -> None:
        """One file as an artifact: a hard link where the store is on the same disk."""
        if self.local_artifacts is None:
            self.client.log_artifact(self.run_id, str(path), folder)
            return
        target = self.local_artifacts / (folder or "") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            # Only weights are linked: they are written once, under a new name; small files may be rewritten.
            if path.suffix != ".safetensors":
                raise OSError("copied")
            os.link(path, target)
        except OSError:
            shutil.copy2(path, target)

    def add_files(self, paths: Sequence[Path]) -> None:
        """Files of the run folder; plots keep their sub-folder."""
        for path in paths:
            self.add_file(path, "plots" if path.suffix == ".png" else None)

    def finish(self, status: str) -> None:
        """Close the run with its final status."""
        self.client.set_terminated(self.run_id, status)


def reopen(store: Store, run_id: str, step: int, metrics: Mapping[str, float]) -> None:
    """Add points to a run that has ended."""
    client, _ = connect(store)
    now = int(time.time() * 1000)
    client.log_batch(run_id, metrics=[entities.Metric(name, value, now, step) for name, value in metrics.items()])


def connect(store: Store) -> tuple[MlflowClient, str]:
    """A client and the experiment's id; a local store and the experiment are made on first use."""
    if store.artifacts is None:
        client = MlflowClient(store.uri)
        return client, _get_or_create(client, store)
    store.artifacts.mkdir(parents=True, exist_ok=True)
    # Without the lock, processes that start together on a fresh sqlite break each other's migrations.
    with FileLock(store.artifacts.parent / ".mlflow.lock"):
        client = MlflowClient(store.uri)
        return client, _get_or_create(client, store)


def _get_or_create(client: MlflowClient, store: Store) -> str:
    known = client.get_experiment_by_name(store.experiment)
    if known is not None:
        return str(known.experiment_id)
    location = store.artifacts.as_uri() if store.artifacts else None
    return str(client.create_experiment(store.experiment, artifact_location=location))


def _dataset_input(split: Mapping[str, Any], name: str, context: str) -> entities.DatasetInput:
    counts = {key: split[key] for key in ("documents", "tokens", "chunks")}
    dataset = entities.Dataset(
        name=f"{split['source']} {name}"[:500],
        digest=split["sha256"][:36],
        source_type="mlmx",
        source=json.dumps({"source": split["source"]}),
        profile=json.dumps(counts),
    )
    return entities.DatasetInput(dataset, [entities.InputTag("mlflow.data.context", context)])
