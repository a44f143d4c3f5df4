"""One run in an MLflow store, through the client API: no global state, no exit handlers.

Loads MLflow, so that it is imported after `store.connect`, which sets that up.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient, entities
from mlflow.exceptions import MlflowException

from mlmx.config.errors import brief
from mlmx.runs.provenance import NOTE
from mlmx.runs.records import MlflowRecord, SplitRecord, milliseconds_of
from mlmx.tracking.artifacts import Artifacts

if TYPE_CHECKING:
    from mlmx.tracking.system import Sample

log = logging.getLogger("mlmx")

MOST_POINTS, MOST_PARAMS = 1000, 100  # that MLflow takes in one call
LONGEST_TAG = 8000  # characters; it cuts longer ones
SYSTEM = "system/"  # metrics of the machine, by MLflow's own prefix
RESUMABLE = "resumable"  # the tag of a run that ended early
Point = tuple[str, int, float | str]


class MlflowRun:
    """The MLflow run of a run folder, found or made (with ``make`` false, a `LookupError`); every method raises what
    the store raises."""

    def __init__(self, client: MlflowClient, experiment: str, record: MlflowRecord, make: bool = True) -> None:
        self.client, self.experiment, self.record = client, experiment, record
        found: entities.Run | None = None
        if record.run_id:
            try:
                found = client.get_run(record.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # in another store, or in one that was made anew
                    raise
        found = found or min(self._same(), key=lambda run: str(run.info.run_id), default=None)
        if found is None and not make:
            raise LookupError(f"it has no run {record.run_id}")
        self.made = found is None
        run = found or client.create_run(experiment, record.started, dict(record.tags), record.name)
        self.run_id: str = run.info.run_id
        self.experiment = run.info.experiment_id  # where its models belong
        self.files = Artifacts(run.info.artifact_uri, client.tracking_uri)
        self.has: dict[Point, int] = {}  # the points that it had, and when they are from; none of them is sent to it
        for name in found.data.metrics if found else ():
            if not name.startswith(SYSTEM):
                points = client.get_metric_history(self.run_id, name)
                self.has |= {as_kept(point.key, point.step, point.value): point.timestamp for point in points}
        self.epoch_at = -1  # the last step whose epoch has been sent
        self.refused: set[str] = set()  # names of metrics that MLflow does not take
        self.datasets: dict[str, tuple[str, str]] = {}  # name and digest, once it has been described

    def _same(self) -> list[entities.Run]:
        """Runs that began at the moment of this one, for its folder: itself, and what a lost answer left behind."""
        same = self.client.search_runs([self.experiment], f"attributes.start_time = {self.record.started}")
        return [run for run in same if run.data.tags.get("mlmx.folder") == self.record.tags.get("mlmx.folder")]

    def reopen(self) -> None:
        """The run goes on: RUNNING again, and no longer marked as one that ended early."""
        run = self.client.get_run(self.run_id)
        if run.info.lifecycle_stage == "deleted":
            self.client.restore_run(self.run_id)
        if RESUMABLE in run.data.tags:
            self.client.delete_tag(self.run_id, RESUMABLE)
        self.client.update_run(self.run_id, "RUNNING")

    def describe(self, report: Mapping[str, SplitRecord]) -> dict[str, int]:
        """Dials, tags and the splits of the data report as datasets; returns how many of each were not there."""
        run, record = self.client.get_run(self.run_id), self.record
        params = [entities.Param(key, value) for key, value in record.params.items() if key not in run.data.params]
        wanted, there = {key: value[:LONGEST_TAG] for key, value in record.tags.items()}, run.data.tags
        # A note may have been edited in MLflow since: only our own tags are put right, and a note that is still ours.
        ours = {note[:LONGEST_TAG] for note in record.notes}
        own = [key for key in wanted if key.startswith("mlmx.") or (key == NOTE and there.get(key) in ours)]
        wrong = [key for key in wanted if key not in there or (key in own and there[key] != wanted[key])]
        tags = [entities.RunTag(key, wanted[key]) for key in wrong]
        for start in range(0, max(len(params), 1), MOST_PARAMS):
            some, along = params[start : start + MOST_PARAMS], () if start else tags
            if some or along:
                self.client.log_batch(self.run_id, params=some, tags=along)
        known = {(one.dataset.name, one.dataset.digest) for one in (run.inputs.dataset_inputs if run.inputs else [])}
        lacking = []
        for name, context in (("train", "training"), ("eval", "validation"), ("heldout", "testing")):
            if split := report.get(name):
                counts = {"documents": split.documents, "tokens": split.tokens, "chunks": split.chunks}
                source, title = json.dumps({"source": split.source}), f"{split.source} {name}"[:500]
                dataset = entities.Dataset(title, split.sha256[:36], "mlmx", source, profile=json.dumps(counts))
                self.datasets[name] = (dataset.name, dataset.digest)
                if self.datasets[name] not in known:
                    lacking.append(entities.DatasetInput(dataset, [entities.InputTag("mlflow.data.context", context)]))
        if lacking:
            self.client.log_inputs(self.run_id, lacking)
        return {"params": len(params), "tags": len(tags), "datasets": len(lacking)}

    def log(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Rows of metrics.jsonl as points, each at its own step and time, the epoch once per step; returns how many
        were not there."""
        points, step_at = [], self.epoch_at
        for row in rows:
            step, at = row["step"], milliseconds_of(row["time"])
            known = {"step", "time"} | ({"epoch"} if step <= step_at else set()) | self.refused
            names = [name for name in row if name not in known and as_kept(name, step, row[name]) not in self.has]
            points += [entities.Metric(name, row[name], at, step) for name in names]
            step_at = max(step_at, step)
        sent = self._send(points)
        self.epoch_at = step_at
        return sent

    def log_samples(self, samples: Sequence[Sample]) -> None:
        """What the machine did, by the names of MLflow's page of system metrics."""
        named = [(f"{SYSTEM}{name}", value, at, step) for step, at, values in samples for name, value in values.items()]
        self._send([entities.Metric(*point) for point in named])

    def _send(self, points: Sequence[entities.Metric]) -> int:
        """Returns how many MLflow has taken; of those that it refuses for what they are it gets the rest."""
        sent = 0
        for start in range(0, len(points), MOST_POINTS):
            some = points[start : start + MOST_POINTS]
            try:
                self.client.log_batch(self.run_id, metrics=some)
                sent += len(some)
            except MlflowException as error:
                self.ping()
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                first, *others = dict.fromkeys(point.key for point in some)
                if others:
                    sent += sum(self._send([point for point in some if point.key == name]) for name in (first, *others))
                else:
                    self.refused.add(first)
                    why = brief(error)
                    log.warning("MLflow does not take the metric %s (%s); it stays in metrics.jsonl", first, why)
        return sent

    def ping(self) -> None:
        """Raises where MLflow is away, or the run is no longer one that takes anything."""
        if self.client.get_run(self.run_id).info.lifecycle_stage == "deleted":
            raise RuntimeError(f"run {self.run_id} was deleted in MLflow; mlflow runs restore brings it back")

    def finish(self, status: str, resumable: bool, ended: int) -> bool:
        """Close the run with its final status, at ``ended`` (milliseconds since 1970), and where it ended early with a
        tag that says whether it can go on; returns whether that was not there."""
        tag = str(resumable).lower() if status in ("KILLED", "FAILED") else None
        run = self.client.get_run(self.run_id)
        there = (run.info.status, run.info.end_time, run.data.tags.get(RESUMABLE))
        if there != (status, ended, tag):
            if tag is not None:
                self.client.set_tag(self.run_id, RESUMABLE, tag)
            elif there[2] is not None:
                self.client.delete_tag(self.run_id, RESUMABLE)
            self.client.set_terminated(self.run_id, status, ended)
        for twin in self._same():
            if twin.info.run_id != self.run_id:  # made by a call whose answer was lost; nothing was sent to it
                self.client.delete_run(twin.info.run_id)
        return there != (status, ended, tag)


def as_kept(name: str, step: int, value: float) -> Point:
    """A point as databases keep it, which have no infinity; without its time: what a resumed run repeats is the same.

    >>> as_kept("train/loss", 3, float("inf")) == ("train/loss", 3, sys.float_info.max)
    True
    """
    most = sys.float_info.max
    return name, step, "NaN" if math.isnan(value) else max(-most, min(most, float(value)))
