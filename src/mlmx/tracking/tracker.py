"""What a run writes down: numbers, checkpoints and how it ends, in its folder first; MLflow follows the folder.

Light to import: MLflow is loaded by the thread that follows.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlmx.config.redaction import redact, redacted
from mlmx.runs import records
from mlmx.runs.metrics_file import MetricsFile
from mlmx.runs.provenance import NOTE, PROCESS_TAGS
from mlmx.runs.records import MlflowRecord, Result, Status, milliseconds
from mlmx.runs.run import EXAMPLES_FILE, Run
from mlmx.tracking.follower import Follower
from mlmx.tracking.mirror import Mirror, Thing, record_of, renoted, update
from mlmx.tracking.store import Store, reason
from mlmx.tracking.system import SystemMetrics

log = logging.getLogger("mlmx")
STEPS_SAID_EVERY_SECONDS = 0.25  # saying a step costs as much as keeping the numbers of two or three


class Tracker:
    """A run's numbers and checkpoints, written to its folder at once; a thread of its own brings MLflow the same.

    Whatever MLflow does, the run goes on. In the folder of a run that is resumed it goes on with that run's files and
    MLflow run; what a resumed training repeats is not written twice.
    """

    def __init__(self, run: Run, store: Store | None) -> None:
        self.run, self.store = run, store
        self.lines = MetricsFile(run.folder)
        rows = run.metrics()
        self.had = {(row["step"], name): row[name] for row in rows for name in row if "/" in name}
        self.last: dict[str, float] = {name: row[name] for row in rows for name in row if "/" in name}
        self.first = {name: value for (step, name), value in self.had.items() if step == 0}  # before training
        self.latest: tuple[int, float] = (rows[-1]["step"], rows[-1]["epoch"]) if rows else (0, 0.0)
        self.record = record_of(run)
        self.result = Result(run_id=self.record.run_id if self.record else None)
        self.opening = ""  # what the MLflow run's description begins with
        self.said = -math.inf  # when a step was said, by the monotonic clock
        self.system: SystemMetrics | None = None
        self.writing = threading.Lock()  # files are written again by the follower's thread, with the id
        self.follower = Follower(run, store, self._opened) if store is not None else None

    @property
    def run_id(self) -> str | None:
        """Of the MLflow run, once it is known."""
        return self.result.run_id

    def start(
        self,
        name: str,
        protocol: str,  # id of what the scores are measured on
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        report: Mapping[str, Mapping[str, Any]],  # of the data; its splits become the MLflow run's datasets
        registered: str | None = None,  # its best and last models' name in MLflow's registry, once it has finished
        rotates: bool = False,  # older checkpoints are deleted as new ones come, and so are their models in MLflow
    ) -> None:
        """Write what is known before training; MLflow is asked for the run."""
        name, params, tags, report = (redacted(given) for given in (name, params, tags, report))
        self.run.write_json("data.json", report)
        self.opening = tags.get(NOTE, "")
        params, before = {key: str(value) for key, value in params.items()}, self.record
        if before is None:
            record = MlflowRecord(name, dict(tags), params, started=milliseconds())
        else:  # of a run that is gone on with MLflow lets no param change
            other = {f"mlmx.resumed.{key}": value for key, value in params.items() if before.params.get(key) != value}
            own = {key: value for key, value in tags.items() if key in PROCESS_TAGS}
            record = replace(before, tags=before.tags | other | own)
        kept = self._kept() if rotates else None
        record = replace(renoted(record, self.opening), ended=None, register=registered, kept=kept)
        self._write(record, run_name=name, command=tags.get("mlmx.command"), protocol=protocol)
        if self.follower is not None:
            self.follower.start()
            if self.follower.mirror.store.system_metrics:
                self.system = SystemMetrics(record.started, self.follower.log)
                self.follower.mirror.samples = self.system.waiting

    def log(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Numbers of an optimizer step: a line of metrics.jsonl, from there points in MLflow; said aloud as well.

        Of steps that log many times a second some are said; scores always are.
        """
        self.latest = (step, epoch)
        new = dict(metrics)
        for name, value in metrics.items() if self.had else ():
            was = self.had.get((step, name))
            if was is not None and (math.isfinite(was) or not math.isfinite(value)):
                del new[name]  # it was there before, and not as of a step that failed and was mended since
        if new:
            self.last = self.last | new
            self.first = self.first | new if step == 0 else self.first
            self.lines.append(step, epoch, new)
            if self.follower is not None:
                self.follower.log()
        if all(name.startswith("train/") for name in metrics):
            if time.monotonic() < self.said + STEPS_SAID_EVERY_SECONDS:
                return
            self.said = time.monotonic()
        shown = "  ".join(f"{name} {value:,.5g}" for name, value in metrics.items() if not name.startswith("final/"))
        if shown:
            log.info("epoch %g  step %d  %s", round(epoch, 2), step, shown)

    def fills(self, step: int, epoch: float, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of the example table; those of a step that was there before are put in its place."""
        before: dict[str, Any] = {}
        with contextlib.suppress(ValueError):  # torn: no reason for a run to end
            before = self.run.read_json(EXAMPLES_FILE)
        columns = ["step", "epoch", *rows[0]]
        kept = [row for row in before.get("data", []) if row[0] != step] if before.get("columns") == columns else []
        table = sorted([*kept, *([step, round(epoch, 6), *row.values()] for row in rows)], key=lambda row: row[0])
        text = json.dumps(redacted({"columns": columns, "data": table}), ensure_ascii=False)
        self.run.write_text(EXAMPLES_FILE, text)
        tables = json.dumps([{"path": EXAMPLES_FILE, "type": "table"}])
        self._tag("mlflow.loggedArtifacts", tables)  # those that it shows side by side with other runs

    def prune(self) -> None:
        """The training is ended early, as no better than others were by then."""
        self._write(pruned=True)
        self._tag("mlmx.pruned", "true")

    def checkpoint(self, folder: Path, step: int, epoch: float) -> None:
        """A checkpoint is whole; MLflow gets its weights, configuration and tokenizer, its optimizer stays local."""
        log.info("epoch %g  step %d  checkpoint %s", round(epoch, 2), step, folder)
        if self.record is not None and self.record.kept is not None:
            self._write(replace(self.record, kept=self._kept()))
        self._look()

    def annotate(self, text: str) -> None:
        """Put this below the opening of the MLflow run's description at its end; one that a person has edited stays."""
        if self.record is not None:
            self.record = renoted(self.record, redact(f"{self.opening}\n\n{text}"))

    def settle(self, ended: Sequence[Run]) -> None:
        """Bring MLflow up to date on other runs of its store that have ended without its knowing."""
        if self.follower is not None:
            mirror = self.follower.mirror
            for run in filter(record_of, ended):  # others ended before MLflow was to know of them
                bring = partial(lambda one, _: update(one, mirror.store), run)
                mirror.also.append(Thing(f"the end of {run.folder}", True, bring))
            self._look()

    def finish(self, status: str, seconds: Mapping[str, float], resumable: bool = False) -> None:
        """Write the true status: FINISHED, FAILED or KILLED, and then whether it is ``resumable``; MLflow follows."""
        self.lines.close()
        if self.system is not None:
            self.system.ended.set()
        record = self.record and replace(self.record, ended=milliseconds())
        try:
            self._write(record, status=Status(status), seconds=dict(seconds), resumable=resumable)
        except OSError:  # a full disk, which is no reason for MLflow to say that it runs
            if self.follower is not None:
                self.follower.mirror.ended = Status(status), resumable
            raise
        finally:
            if self.follower is not None:
                self.follower.finish()

    def _kept(self) -> list[str]:
        return sorted(path.name for path in self.run.checkpoints.glob("checkpoint-*"))

    def _tag(self, name: str, value: str) -> None:
        if self.record is not None and self.record.tags.get(name) != value:
            self._write(replace(self.record, tags=self.record.tags | {name: value}))
        self._look()

    def _look(self) -> None:
        if self.follower is not None:
            self.follower.look()

    def _opened(self, run_id: str) -> None:
        self._write(run_id=run_id)

    def _write(self, record: MlflowRecord | None = None, **result: Any) -> None:  # noqa: ANN401 (fields of the result)
        """What has changed of mlflow.json and result.json."""
        with self.writing:
            self.result = replace(self.result, metrics=self.last, **result)
            if record := record or self.record:
                self.record = replace(record, run_id=self.result.run_id)
                records.write(self.record, self.run.folder)
            records.write(self.result, self.run.folder)


def add_metrics(store: Store | None, run: Run) -> None:
    """Bring the MLflow run of an ended run the numbers that it lacks; a store that is away is said, not raised."""
    record = record_of(run)
    if store is None or record is None or not record.run_id:
        return
    try:
        Mirror(run, store, lambda run_id: None).send_numbers()
    except Exception as error:  # noqa: BLE001 (of many kinds, from MLflow's and its database's)
        log.warning("MLflow run %s did not get these numbers (%s)", record.run_id, reason(error, store))
