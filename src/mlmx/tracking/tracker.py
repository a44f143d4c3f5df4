"""Tracking: local files first, MLflow second.

`Store` says where MLflow keeps its records; `Tracker` writes a run's numbers to its folder, and a `writer` brings them
from there to MLflow. Light to import: MLflow is loaded by `mlflow_run`, in the writer's thread.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlmx.config.redaction import redact, redacted
from mlmx.runs import provenance
from mlmx.runs.metrics_file import MetricsFile
from mlmx.runs.provenance import NOTE
from mlmx.runs.run import EXAMPLES_FILE, Run
from mlmx.tracking.logged_models import Saved, Scores
from mlmx.tracking.mirror import RUN_FILE, replace_note, saved_models, send, send_files, send_models
from mlmx.tracking.registry import register
from mlmx.tracking.store import Store, reason
from mlmx.tracking.system import SystemMetrics
from mlmx.tracking.writer import Writer

if TYPE_CHECKING:
    from mlmx.tracking.mlflow_run import MlflowRun

log = logging.getLogger("mlmx")
PRUNED = "mlmx.pruned"  # tag of a trial that was ended early
STEPS_SAID_EVERY_SECONDS = 0.25  # saying a step costs as much as keeping the numbers of two or three
TABLES = "mlflow.loggedArtifacts"  # those that it shows side by side with other runs


class Tracker:
    """A run's numbers and checkpoints, written to its folder at once and to MLflow in a thread of its own.

    Whatever MLflow does, the run goes on. In the folder of a run that is resumed it goes on with that run's files and
    MLflow run; what a resumed training repeats is not written twice.
    """

    def __init__(self, run: Run, store: Store | None) -> None:
        self.run = run
        self.store = store
        self.lines = MetricsFile(run.folder)
        rows = run.metrics()
        self.had = {(row["step"], name): row[name] for row in rows for name in row if "/" in name}
        self.last: dict[str, float] = {name: row[name] for row in rows for name in row if "/" in name}
        self.first = {name: value for (step, name), value in self.had.items() if step == 0}  # before training
        self.latest: tuple[int, float] = (rows[-1]["step"], rows[-1]["epoch"]) if rows else (0, 0.0)
        self.scores = Scores(rows)
        self.told: dict[str, Any] = run.read_json(RUN_FILE)
        self.run_id: str | None = self.told.get("run_id")
        self.status, self.resumable = "RUNNING", False
        self.about: dict[str, Any] = {}
        self.seconds: Mapping[str, float] = {}
        self.opening = ""  # what the MLflow run's description begins with
        self.said = -math.inf  # when a step was said, by the monotonic clock
        self.system: SystemMetrics | None = None
        self.writing = threading.Lock()  # files are written again by the writer's thread, with the id
        self.writer = Writer(store, self.lines.path, self._opened) if store is not None else None

    def start(
        self,
        name: str,
        protocol: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        report: Mapping[str, Mapping[str, Any]],
        registered: str | None = None,
        rotates: bool = False,
    ) -> None:
        """Write what is known before training, and ask for the MLflow run.

        Args:
            protocol: id of what the scores are measured on.
            report: the data report; its splits become the MLflow run's datasets.
            registered: by what name its best and last models go into MLflow's registry when it has finished.
            rotates: older checkpoints are deleted as new ones come, and so are their models in MLflow.
        """
        name, params, tags, report = (redacted(given) for given in (name, params, tags, report))
        self.about = {"run_name": name, "command": tags.get("mlmx.command"), "protocol": protocol}
        self.run.write_json("data.json", report)
        resumed = bool(self.told)
        self._retell(name, {key: str(value) for key, value in params.items()}, tags)
        self.told |= {"ended": None, "register": registered, "kept": self._kept() if rotates else None}
        self.opening = tags.get(NOTE, "")
        replace_note(self.told, self.opening)
        self._write()
        if self.writer is not None:
            self.writer.start(self.told, resumed)
            self._sample()
            self.writer.do("params and datasets", lambda mlflow: mlflow.describe(report))
            self._send_files()
            if resumed:
                self.writer.do("earlier checkpoints", self._send_earlier)

    def _retell(self, name: str, params: dict[str, str], tags: Mapping[str, str]) -> None:
        """What makes the MLflow run; of one that is gone on with MLflow lets no param change."""
        if not self.told:
            started = int(time.time() * 1000)
            self.told = {"name": name, "tags": dict(tags), "params": params, "started": started, "run_id": None}
            return
        other = {key: value for key, value in params.items() if self.told["params"].get(key) != value}
        self.told["tags"] |= {f"mlmx.resumed.{key}": value for key, value in other.items()}
        self.told["tags"] |= {key: value for key, value in tags.items() if key in provenance.PROCESS_TAGS}

    def log(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Numbers of an optimizer step: a line of metrics.jsonl, from there points in MLflow; said aloud as well.

        Of steps that log many times a second some are said; scores always are.
        """
        self.latest = (step, epoch)
        new = self._new(step, metrics)
        scored = not all(name.startswith("train/") for name in metrics)
        if new:
            self.last = {**self.last, **new}
            self.first = {**self.first, **new} if step == 0 else self.first
            row = self.lines.append(step, epoch, new)
            if self.writer is not None:
                self.writer.log()
            if scored and self.scores.add(row) and (saved := self.run.checkpoints / f"checkpoint-{step}").is_dir():
                self._send_model(Saved(saved, step, epoch))  # it was saved before it was scored
        if scored or time.monotonic() >= self.said + STEPS_SAID_EVERY_SECONDS:
            self._say(step, epoch, metrics, scored)

    def _say(self, step: int, epoch: float, metrics: Mapping[str, float], scored: bool) -> None:
        if not scored:
            self.said = time.monotonic()
        shown = "  ".join(f"{name} {value:,.5g}" for name, value in metrics.items() if not name.startswith("final/"))
        if shown:
            log.info("epoch %g  step %d  %s", round(epoch, 2), step, shown)

    def fills(self, step: int, epoch: float, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of the example table; those of a step that was there before are put in its place."""
        before = self.run.read_json(EXAMPLES_FILE)
        columns = ["step", "epoch", *rows[0]]
        kept = [row for row in before.get("data", []) if row[0] != step] if before.get("columns") == columns else []
        table = sorted([*kept, *([step, round(epoch, 6), *row.values()] for row in rows)], key=lambda row: row[0])
        text = json.dumps(redacted({"columns": columns, "data": table}), ensure_ascii=False)
        self.run.write_text(EXAMPLES_FILE, text)
        first = TABLES not in self.told["tags"]
        if first:
            self.told["tags"][TABLES] = json.dumps([{"path": EXAMPLES_FILE, "type": "table"}])
            self._write()
        if self.writer is not None:
            self.writer.do(EXAMPLES_FILE, partial(self._send_fills, first))

    def prune(self) -> None:
        """The training is ended early, as no better than others were by then; MLflow hears of it with its outcome."""
        self.about["pruned"] = True
        if self.told:
            self.told["tags"][PRUNED] = "true"
        self._write()

    def _send_fills(self, first: bool, mlflow: MlflowRun) -> None:
        mlflow.add_file(self.run.folder / EXAMPLES_FILE)
        if first:  # its tag is new
            mlflow.describe({})

    def annotate(self, text: str) -> None:
        """Put this below the opening of the MLflow run's description; one that a person has edited stays."""
        if self.told:
            replace_note(self.told, redact(f"{self.opening}\n\n{text}"))
            if self.writer is not None:
                self.writer.do("its description", lambda mlflow: mlflow.describe({}))

    def _sample(self) -> None:
        if self.store is not None and self.store.system_metrics and self.writer is not None:
            self.system = SystemMetrics(self.told["started"], self.writer.log)
            self.writer.samples = self.system.waiting

    def _new(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Those that were not there before, or only as of a step that failed and was mended since."""
        if not self.had:
            return metrics
        return {
            name: value
            for name, value in metrics.items()
            if (was := self.had.get((step, name))) is None or (not math.isfinite(was) and math.isfinite(value))
        }

    def checkpoint(self, folder: Path, step: int, epoch: float) -> None:
        """The weights, configuration and tokenizer of a saved checkpoint; its optimizer stays local."""
        log.info("epoch %g  step %d  checkpoint %s", round(epoch, 2), step, folder)
        rotates = self.told.get("kept") is not None
        if rotates:
            self.told["kept"] = self._kept()
            self._write()
        self._send_model(Saved(folder, step, epoch))
        if rotates and self.writer is not None:
            kept = self.told["kept"]
            self.writer.do("what is kept", lambda mlflow: mlflow.models.keep(kept))

    def model(self, folder: Path) -> None:
        """The model that the run ends with, at its last step."""
        step, epoch = self.latest
        if folder.is_dir():
            self._send_model(Saved(folder, step, epoch, final=True))

    def _send_model(self, saved: Saved) -> None:
        rotates = self.told.get("kept") is not None and not saved.final
        if self.writer is not None:
            what = "its model" if saved.final else saved.folder.name
            self.writer.do(what, partial(_add_model, saved, self.scores, rotates))

    def _kept(self) -> list[str]:
        """The checkpoints that are there."""
        return sorted(path.name for path in self.run.checkpoints.glob("checkpoint-*"))

    def _send_earlier(self, mlflow: MlflowRun) -> None:
        send_models(mlflow, self.run, self.scores, final=False)
        if self.told["kept"] is not None:
            mlflow.models.keep(self.told["kept"])

    def settle(self, ended: Sequence[Run]) -> None:
        """Bring MLflow up to date on other runs of its store that have ended without telling it."""
        for run in ended:
            if self.writer is not None and self.store is not None:
                self.writer.do(f"the end of {run.folder}", partial(_send, run, self.store))

    def finish(self, status: str, seconds: Mapping[str, float], resumable: bool = False) -> None:
        """Write the result and close the MLflow run, both with the true status (FINISHED, FAILED, KILLED).

        Args:
            resumable: whether a run that ended early can go on.
        """
        ended = int(time.time() * 1000)
        self.status, self.seconds, self.resumable = status, dict(seconds), resumable
        self.lines.close()
        if self.system is not None:
            self.system.stop()
        if self.told:
            self.told["ended"] = ended
        try:
            self._write()
        finally:
            if self.writer is not None:
                self._send_files()
                if status == "FINISHED" and self.told.get("register"):
                    self.writer.do(f"the versions of {self.told['register']}", partial(self._register, ended))
                self.writer.finish(status, resumable, ended)

    def _register(self, ended: int, mlflow: MlflowRun) -> None:
        register(mlflow, self.told["register"], saved_models(self.run, final=True), self.scores, ended)

    def _opened(self, run_id: str) -> None:
        self.run_id = self.told["run_id"] = run_id
        self._write()

    def _write(self) -> None:
        with self.writing:
            if self.told:
                self.run.write_json(RUN_FILE, self.told)
            result = {"status": self.status, "resumable": self.resumable, "run_id": self.run_id, **self.about}
            self.run.write_json("result.json", result | {"metrics": self.last, "seconds": self.seconds})

    def _send_files(self) -> None:
        assert self.writer is not None
        self.writer.do("its files", lambda mlflow: send_files(mlflow, self.run))


def _add_model(saved: Saved, scores: Scores, rotates: bool, mlflow: MlflowRun) -> None:
    try:
        mlflow.add_model(saved, dict(scores.at.get(saved.step, {})))
    except FileNotFoundError:
        if not rotates or saved.folder.exists():
            raise  # else it was let go of before MLflow came to it, and so is what MLflow has of it


def _send(run: Run, store: Store, _: Any) -> None:
    if run.read_json(RUN_FILE):  # else it ended before MLflow was to know of it
        send(run, store)


def add_metrics(store: Store | None, run: Run, row: Mapping[str, Any]) -> None:
    """Add a row of metrics.jsonl to the MLflow run of an ended run; a store that is away is said, not raised."""
    told = run.read_json(RUN_FILE)
    if store is None or not told.get("run_id"):
        return
    try:
        from mlmx.tracking.mlflow_run import add_points

        add_points(store, told, row)
    except Exception as error:
        log.warning("MLflow run %s did not get these numbers (%s)", told["run_id"], reason(error, store))
