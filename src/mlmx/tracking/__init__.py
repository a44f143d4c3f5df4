"""Tracking: local files first, MLflow second.

`Store` says where MLflow keeps its records; `Tracker` writes a run's numbers to both places. Light to import:
MLflow is loaded by `mlflow_run` when a tracker starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlmx.config import require, table
from mlmx.places import outputs_dir
from mlmx.runs import HELDOUT_FILE, Run

if TYPE_CHECKING:
    from mlmx.tracking.mlflow_run import MlflowRun

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
    """A run's numbers and checkpoints, written to its folder and then to MLflow.

    Whatever MLflow does, the run goes on: its first failure is said once and it is left alone from then on.
    """

    def __init__(self, run: Run, store: Store | None) -> None:
        self.run = run
        self.store = store
        self.mlflow: MlflowRun | None = None
        self.run_id: str | None = None
        self.last: dict[str, float] = {}
        self.latest = (0, 0.0)
        self.plots: list[Path] = []
        self.about: dict[str, Any] = {}

    def start(
        self,
        name: str,
        protocol: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        report: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Write what is known before training, and open the MLflow run.

        Args:
            protocol: id of what the scores are measured on.
            report: the data report; its splits become the MLflow run's datasets.
        """
        self.about = {"run_name": name, "command": tags.get("mlmx.command"), "protocol": protocol}
        self.run.write_json("data.json", report)
        if self.store is not None:
            try:
                from mlmx.tracking.mlflow_run import MlflowRun

                self.mlflow = MlflowRun(self.store, name, params, tags, report)
                self.run_id = self.mlflow.run_id
            except Exception as error:
                self._away(error)
        self._send(lambda mlflow: mlflow.add_files(self._files()))
        self._write_result("RUNNING", {})

    def log(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Numbers of an optimizer step: a line of metrics.jsonl, then points in MLflow; said aloud as well."""
        self.last |= metrics
        self.latest = (step, epoch)
        self.run.append_metrics(step, epoch, metrics)
        shown = "  ".join(f"{name} {value:,.5g}" for name, value in metrics.items() if not name.startswith("final/"))
        if shown:
            log.info("epoch %g  step %d  %s", round(epoch, 2), step, shown)
        self._send(lambda mlflow: mlflow.log(step, {**metrics, "epoch": epoch}))

    def checkpoint(self, folder: Path, step: int, epoch: float) -> None:
        """The weights, configuration and tokenizer of a saved checkpoint; its optimizer stays local."""
        log.info("epoch %g  step %d  checkpoint %s", round(epoch, 2), step, folder)
        self._send(lambda mlflow: mlflow.add_model(folder, f"checkpoints/epoch-{epoch:g}"))

    def finish(self, status: str, seconds: Mapping[str, float]) -> None:
        """Write the result and close the MLflow run, both with the true status (FINISHED, FAILED, KILLED)."""
        self._write_result(status, seconds)
        self._send(lambda mlflow: mlflow.add_files(self._files()))
        self._send(lambda mlflow: mlflow.finish(status))

    def _write_result(self, status: str, seconds: Mapping[str, float]) -> None:
        metrics = {"metrics": self.last, "seconds": dict(seconds)}
        self.run.write_json("result.json", {"status": status, "run_id": self.run_id, **self.about, **metrics})

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

    def _send(self, deed: Callable[[MlflowRun], None]) -> None:
        if self.mlflow is None:
            return
        try:
            deed(self.mlflow)
        except Exception as error:
            self._away(error)

    def _away(self, error: Exception) -> None:
        self.mlflow = None
        reason = " ".join(str(error).split())[:300]
        log.warning(
            "MLflow cannot be reached and is left alone from here on (%s: %s); every number is in %s",
            type(error).__name__,
            reason,
            self.run.folder / "metrics.jsonl",
        )


def add_metrics(store: Store | None, run_id: str | None, step: int, metrics: Mapping[str, float]) -> None:
    """Add points to an MLflow run made earlier; a store that is away is said, not raised."""
    if store is None or run_id is None:
        return
    try:
        from mlmx.tracking.mlflow_run import reopen

        reopen(store, run_id, step, metrics)
    except Exception as error:
        log.warning("MLflow run %s did not get these numbers (%s: %s)", run_id, type(error).__name__, error)
