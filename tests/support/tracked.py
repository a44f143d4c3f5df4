"""Runs without a training whose record goes to MLflow, and what MLflow has of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from mlmx.config.schema import TrainConfig
from mlmx.runs.run import Run, begin_run
from mlmx.tracking.store import Store, local
from mlmx.tracking.tracker import Tracker

REPORT = {
    split: {
        "source": "imdb_packaged",
        "documents": 3,
        "tokens": 30,
        "chunks": 2,
        "dropped_tokens": 0,
        "sha256": "ab" * 32,
    }
    for split in ("corpus", "train", "eval")
}


def tracker(folder: Path, store: Store | None) -> Tracker:
    folder.mkdir(parents=True)
    made = Tracker(Run(folder), store)
    made.start("a name", "eval-1", {"lr": 1e-5}, {"mlmx.command": "train", "mlmx.folder": str(folder)}, REPORT)
    return made


def until(true: Callable[[], bool]) -> None:
    """Wait for what another thread or process does (pytest's timeout ends it)."""
    while not true():
        time.sleep(0.01)


def caught_up(made: Tracker) -> bool:
    """Whether MLflow is in touch and has all that the run's folder has now."""
    assert made.follower is not None
    mirror = made.follower.mirror
    if mirror.mlflow is None or made.follower.failures:
        return False
    return mirror.sent_bytes == made.lines.size and not mirror.lacking()


def logged(made: Tracker) -> list[tuple[str, int, int, float]]:
    """(name, step, milliseconds, value) of every number in metrics.jsonl."""
    return sorted(
        (name, row["step"], int(datetime.fromisoformat(row["time"]).timestamp() * 1000), value)
        for row in made.run.metrics()
        for name, value in row.items()
        if name not in ("step", "time")
    )


def history(at: Store, made: Tracker) -> list[tuple[str, int, int, float]]:
    """The same of every point that MLflow has of the run, which ended as it should have."""
    from mlflow import MlflowClient

    client = MlflowClient(at.uri)
    run_id = made.run.result().run_id
    assert run_id is not None
    run = client.get_run(run_id)
    assert run.info.status == made.run.status
    points = [point for name in run.data.metrics for point in client.get_metric_history(run_id, name)]
    return sorted((point.key, point.step, point.timestamp, point.value) for point in points)


def of(outputs: Path):
    """The one MLflow run of the local store."""
    from mlflow import MlflowClient

    client = MlflowClient(local().uri)
    [run] = client.search_runs([client.get_experiment_by_name("mlmx").experiment_id])
    return client, run


class Made:
    """What `stored` and `logged` ask of a tracker."""

    def __init__(self, folder: Path) -> None:
        self.run = Run(folder)
        self.run_id = self.run.read_json("result.json")["run_id"]


def opened(folder: Path, protocol: str = "heldout-1", **more: Any) -> Tracker:
    """The tracker of a run of the local store, new or resumed."""
    if not (folder / "config.yaml").exists():
        begin_run(folder, TrainConfig(tracking={"name": "local"}), (), {})
    made = Tracker(Run(folder), local())
    tags = {"mlmx.command": "python -m mlmx train", "mlmx.folder": str(folder), "mlflow.note.content": "a note"}
    made.start("a name", protocol, {"lr": 1e-5}, tags | {"mlmx.protocol": protocol}, REPORT, **more)
    return made


def log_steps(made: Tracker, steps: range) -> None:
    for step in steps:
        made.log(step, step / 100, {"train/loss": 3 + 1 / (step + 1), "train/grad_norm": step * 0.5})


def ended(folder: Path, status: str = "FINISHED", resumable: bool = False) -> Tracker:
    """A run of ten steps that has ended."""
    made = opened(folder)
    log_steps(made, range(1, 11))
    made.finish(status, {}, resumable)
    return made
