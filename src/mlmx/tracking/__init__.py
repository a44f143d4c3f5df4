"""Tracking: local files first, MLflow second.

`Store` says where MLflow keeps its records; `Tracker` writes a run's numbers to its folder, and a `writer` brings them
from there to MLflow. Light to import: MLflow is loaded by `mlflow_run`, in the writer's thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlmx.config import require, table
from mlmx.places import outputs_dir
from mlmx.runs import HELDOUT_FILE, MetricsFile, Run
from mlmx.tracking.writer import Writer

log = logging.getLogger("mlmx")


@dataclass(frozen=True)
class Store:
    """An MLflow store: its absolute address, the experiment, and where local artifacts lie (None: the server's)."""

    uri: str
    experiment: str
    artifacts: Path | None


def local(*, experiment: str = "mlmx") -> Store:
    """sqlite and files below outputs/, at an absolute address."""
    outputs = outputs_dir()
    return Store(f"sqlite:///{outputs / 'mlflow.db'}", experiment, outputs / "mlartifacts")


def server(*, uri: str, experiment: str = "mlmx") -> Store:
    """A running MLflow server, for example ``tracking=server tracking.uri=http://127.0.0.1:5000``."""
    require(
        uri.startswith(("http://", "https://")),
        f"tracking.uri={uri}: must be the address of an MLflow server, http://… or https://…",
    )
    return Store(uri, experiment, None)


def none() -> None:
    """No MLflow; the run folder holds everything."""


TRACKINGS: dict[str, Callable[..., Store | None]] = table(local, server, none)


class Tracker:
    """A run's numbers and checkpoints, written to its folder at once and to MLflow in a thread of its own.

    Whatever MLflow does, the run goes on.
    """

    def __init__(self, run: Run, store: Store | None) -> None:
        self.run = run
        self.store = store
        self.lines = MetricsFile(run.folder)
        self.run_id: str | None = None
        self.status = "RUNNING"
        self.last: dict[str, float] = {}
        self.latest = (0, 0.0)
        self.plots: list[Path] = []
        self.about: dict[str, Any] = {}
        self.seconds: Mapping[str, float] = {}
        self.writing = threading.Lock()  # result.json is written again by the writer's thread, with the id
        self.writer = Writer(store, self.lines.path, self._opened) if store is not None else None

    def start(
        self,
        name: str,
        protocol: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        report: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Write what is known before training, and ask for the MLflow run.

        Args:
            protocol: id of what the scores are measured on.
            report: the data report; its splits become the MLflow run's datasets.
        """
        self.about = {"run_name": name, "command": tags.get("mlmx.command"), "protocol": protocol}
        self.run.write_json("data.json", report)
        self._write_result()
        if self.writer is not None:
            self.writer.start(name, tags)
            self.writer.do("params and datasets", lambda mlflow: mlflow.describe(params, report))
            self._send_files()

    def log(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Numbers of an optimizer step: a line of metrics.jsonl, from there points in MLflow; said aloud as well."""
        self.last = self.last | metrics
        self.latest = (step, epoch)
        self.lines.append(step, epoch, metrics)
        if self.writer is not None:
            self.writer.log()
        shown = "  ".join(f"{name} {value:,.5g}" for name, value in metrics.items() if not name.startswith("final/"))
        if shown:
            log.info("epoch %g  step %d  %s", round(epoch, 2), step, shown)

    def checkpoint(self, folder: Path, step: int, epoch: float) -> None:
        """The weights, configuration and tokenizer of a saved checkpoint; its optimizer stays local."""
        log.info("epoch %g  step %d  checkpoint %s", round(epoch, 2), step, folder)
        if self.writer is not None:
            self.writer.do(folder.name, lambda mlflow: mlflow.add_model(folder, f"checkpoints/epoch-{epoch:g}"))

    def finish(self, status: str, seconds: Mapping[str, float]) -> None:
        """Write the result and close the MLflow run, both with the true status (FINISHED, FAILED, KILLED)."""
        self.status, self.seconds = status, dict(seconds)
        self.lines.close()
        self._write_result()
        if self.writer is not None:
            self._send_files()
            self.writer.finish(status)

    def _opened(self, run_id: str) -> None:
        self.run_id = run_id
        self._write_result()

    def _write_result(self) -> None:
        with self.writing:
            result = {"status": self.status, "run_id": self.run_id, **self.about}
            self.run.write_json("result.json", result | {"metrics": self.last, "seconds": self.seconds})

    def _send_files(self) -> None:
        assert self.writer is not None
        self.writer.do("its files", lambda mlflow: mlflow.add_files(self._files()))

    def _files(self) -> list[Path]:
        names = (
            "config.yaml",
            "overrides.yaml",
            "data.json",
            "metrics.jsonl",
            "result.json",
            "train.log",
            HELDOUT_FILE,
        )
        return [path for name in names if (path := self.run.folder / name).is_file()] + self.plots


def add_metrics(store: Store | None, run_id: str | None, step: int, metrics: Mapping[str, float]) -> None:
    """Add points to an MLflow run made earlier; a store that is away is said, not raised."""
    if store is None or run_id is None:
        return
    try:
        from mlmx.tracking.mlflow_run import reopen

        reopen(store, run_id, step, metrics)
    except Exception as error:
        log.warning("MLflow run %s did not get these numbers (%s: %s)", run_id, type(error).__name__, error)
