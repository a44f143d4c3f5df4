"""MLflow follows a run's folder: whoever finds that it lacks something of it has it brought by `Mirror.update`.

::

    a run's folder holds                what MLflow has of it
    mlflow.json, data.json              the run, its params, tags, description and datasets
    metrics.jsonl                       points
    checkpoints/, model/                models, with the scores of their step; none of what was rotated away
    small files, plots/                 artifacts
    result.json (sweep.json)            once it has ended: versions in the registry, and how it ended

What fails is still lacking, and comes with the next update. Beside a training a `Follower` calls for one each second,
from where the last one stopped; ``sync``, ``doctor`` and a sweep's parent call for one.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlmx.config.errors import RequestError
from mlmx.runs import records
from mlmx.runs.checkpoints import step_of
from mlmx.runs.metrics_file import rows_of
from mlmx.runs.provenance import DIFF_FILE, NOTE, PACKAGES_FILE, resumed_name
from mlmx.runs.records import MlflowRecord, ProcessRecord, Result, Status, SweepRecord
from mlmx.runs.run import EXAMPLES_FILE, HELDOUT_FILE, Run
from mlmx.tracking.artifacts import GROWING
from mlmx.tracking.model_files import Saved, Score
from mlmx.tracking.store import Store, connect, file_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from mlmx.tracking.logged_models import Models
    from mlmx.tracking.mlflow_run import MlflowRun
    from mlmx.tracking.system import Sample

OF_A_RUN = ("config.yaml", "overrides.yaml", "data.json", "metrics.jsonl", "result.json", "train.log")
LINEAGE = (PACKAGES_FILE, resumed_name(PACKAGES_FILE), DIFF_FILE, resumed_name(DIFF_FILE))
OF_A_SWEEP = ("table.md", "table.csv", "report.html", SweepRecord.FILE)
FILES = (*OF_A_RUN, *LINEAGE, EXAMPLES_FILE, HELDOUT_FILE, *OF_A_SWEEP)
COUNTED = ("runs", "params", "tags", "datasets", "points", "models", "files", "versions", "endings")
ENDING = "how it ended"
Deed = Callable[[], Mapping[str, int]]
SCORES = ("eval/", "heldout/")  # metrics that say how good a model is; the rest is about the steps before it


@dataclass(frozen=True)
class Thing:
    """Something of a run's folder that MLflow is to have."""

    name: str
    state: Any  # what it is like now; MLflow lacks it where it was brought in another state, or not at all
    bring: Callable[[Models], Mapping[str, int]]  # says how many of what were not there


class Mirror:
    """A run's folder, or a sweep's, and its MLflow run.

    A point whose first sending had arrived after all is not doubled: the store knows it by key, step, time and value.
    What MLflow has of a run that it knew before is not sent again; where that is to go on, it is open again. ``opened``
    is told the id of the MLflow run.
    """

    def __init__(self, run: Run, store: Store, opened: Callable[[str], None] | None = None) -> None:
        self.run, self.store = run, store
        self.opened = opened or partial(_keep_id, run)
        self.connected: tuple[MlflowClient, str] | None = None
        self.file: tuple[int, int] | None = None  # of a local store
        self.mlflow: MlflowRun | None = None
        self.models: Models | None = None
        self.record, self.status, self.resumable = MlflowRecord(), Status.RUNNING, False  # as they were read last
        self.goes_on = False  # it is being made here, though it may have ended before MLflow was reached
        self.ended: tuple[Status, bool] | None = None  # how, and whether resumable, where no file could be told
        self.metrics = run.folder / "metrics.jsonl"
        self.sent_bytes = 0
        self.scores: dict[int, dict[str, Score]] = {}  # of the steps that were sent
        self.changed = True  # there is something new besides numbers; to be set by whoever writes it, afterwards
        self.scored = False  # there are scores that a model may lack
        self.brought: dict[str, Any] = {}  # the state that each thing was brought in
        self.also: list[Thing] = []  # other things that are to be done in MLflow
        self.samples: deque[Sample] = deque()  # what the machine did
        self.saved: dict[Path, Saved] = {}
        self.heard = time.monotonic()  # when MLflow last took something

    def update(self, bring: Callable[[str, Deed], Mapping[str, int]] = lambda name, deed: deed()) -> Counter[str]:
        """Bring MLflow what it lacks of the folder as it is now, and say how many of each of `COUNTED` that were.

        ``bring`` does what brings the thing of that name, unless its failing is to end the update. `RequestError` for a
        run that was never announced to any store; what MLflow raises comes, too: call it again then.
        """
        if looks := self.changed or self.scored:
            self.changed = False  # what is written from here on is looked at the next time
        counts = Counter(dict.fromkeys(COUNTED, 0))
        try:
            known = self.models is not None
            models = self._opened()
            mlflow = models.mlflow
            counts["runs"] = int(mlflow.made and not known)
            # With a write-ahead log sqlite would not notice, and what it wrote would be lost with the file.
            if file_of(self.store) != self.file:
                raise FileExistsError(f"{self.store.database} was replaced by another file while this run wrote to it")
            things = list(self._things()) if looks else []  # before the numbers: what is listed comes after its numbers
            counts["points"] = self.send_numbers()
            if samples := list(self.samples):
                mlflow.log_samples(samples)
                for _ in samples:
                    self.samples.popleft()
            if looks:
                mlflow.record, self.scored = self.record, False
            for thing in things:
                if self.brought.get(thing.name) != thing.state:
                    counts.update(bring(thing.name, partial(thing.bring, models)))
                    self.brought[thing.name] = copy(thing.state)
                    self.heard = time.monotonic()
            has = mlflow.has.items()  # a file that was lost in part, or put back from a copy, repeats its later steps
            mlflow.has = {one: at for one, at in has if one[1] >= mlflow.epoch_at or one[0].startswith(SCORES)}
            return counts
        except BaseException:
            self.changed, self.connected = True, None
            raise

    def connect(self) -> tuple[MlflowClient, str]:
        """A client of the store, and its experiment."""
        if self.connected is None:
            self.connected = connect(self.store)
            self.file = file_of(self.store)  # before anyone hears of the run and could move the store away
        return self.connected

    def send_numbers(self) -> int:
        """Bring the rows since the last ones, to a run that MLflow has; returns how many points were missing."""
        mlflow, sent = self._opened(make=False).mlflow, 0
        for lines in batches(self.metrics, self.sent_bytes):
            rows = rows_of(lines)
            sent += mlflow.log(rows)
            self.sent_bytes += sum(map(len, lines))
            for row in rows:
                if own := [name for name in row if name.startswith(SCORES)]:
                    at = records.milliseconds_of(row["time"])  # of the last word on a step
                    self.scores.setdefault(row["step"], {}).update({name: (float(row[name]), at) for name in own})
                    self.scored = True
            self.heard = time.monotonic()
        return sent

    def lacking(self) -> list[Thing]:
        """Of what the folder holds now, what was not brought as it is, in the order that it is to come in."""
        return [thing for thing in self._things() if self.brought.get(thing.name) != thing.state]

    def _opened(self, make: bool = True) -> Models:
        if self.models is None:
            self._read()
            client, experiment = self.connect()
            from mlmx.tracking.logged_models import Models  # noqa: PLC0415 (imports MLflow)
            from mlmx.tracking.mlflow_run import MlflowRun  # noqa: PLC0415 (imports MLflow)

            mlflow = MlflowRun(client, experiment, self.record, make)
            if not mlflow.made:
                (mlflow.reopen if self.goes_on or self.status == Status.RUNNING else mlflow.ping)()
            if mlflow.run_id != self.record.run_id:
                self.opened(mlflow.run_id)
            self.mlflow, self.models = mlflow, Models(mlflow)
        return self.models

    def _read(self) -> None:
        folder, record = self.run.folder, record_of(self.run)
        if record is None:
            raise RequestError(f"{folder}: has no {MlflowRecord.FILE}; the run ended before it had anything to send")
        result, sweep = records.read(Result, folder), records.read(SweepRecord, folder)
        self.record, self.status = record, result.status if result else sweep.status if sweep else Status.RUNNING
        self.resumable = result.resumable if result else self.status != Status.FINISHED
        if self.status == Status.RUNNING and self.ended is not None:
            self.status, self.resumable = self.ended

    def _things(self) -> Iterator[Thing]:
        self._read()
        record, report, saved = self.record, records.read_splits(self.run.folder), self._saved()
        ended = self.status != Status.RUNNING
        described = record.tags, record.params, record.notes, report
        yield Thing("params and datasets", described, lambda models: models.mlflow.describe(report))
        for one in saved:
            scores = self.scores.setdefault(one.step, {})  # with those that are still to be read
            yield Thing("its model" if one.final else one.folder.name, scores, partial(self._add_model, one))
        if record.kept is not None:  # what the run has let go of, MLflow lets go of
            kept = {*record.kept, *(one.folder.name for one in saved)}
            yield Thing("what is kept", kept, lambda models: models.keep(kept))
        paths = [path for name in FILES if (path := self.run.folder / name).is_file()]
        files: dict[Path, tuple[int, int]] = {}  # by what one is known to have been written again
        for path in (*paths, *sorted(self.run.plots.glob("*.png"))):
            found = path.stat()  # of one that grows only when the run has ended
            files[path] = (found.st_mtime_ns, found.st_size) if ended or path.suffix not in GROWING else (0, 0)
        yield Thing("its files", files, partial(self._send_files, files))
        yield from self.also
        if ended:
            at, name = record.ended or _ended_at(self.run, record.started), record.register
            if self.status == Status.FINISHED and name:
                yield Thing(f"the versions of {name}", at, lambda models: models.register(name, saved, self.scores, at))
            ending = self.status, self.resumable, at
            yield Thing(ENDING, ending, lambda models: {"endings": int(models.mlflow.finish(*ending))})

    def _saved(self) -> list[Saved]:
        """The checkpoints that are there and, where the run has finished, its model."""
        folders = self.run.saved()
        for folder in folders:
            if folder not in self.saved:
                with contextlib.suppress(FileNotFoundError):  # let go of at this moment
                    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
                    self.saved[folder] = Saved(folder, step_of(folder), state["epoch"])
        rows = self.run.metrics() if self.status == Status.FINISHED and self.run.model.is_dir() else []
        final = [Saved(self.run.model, row["step"], row["epoch"], final=True) for row in rows[-1:]]
        return [*(self.saved[folder] for folder in folders if folder in self.saved), *final]

    def _add_model(self, one: Saved, models: Models) -> dict[str, int]:
        try:
            return {"models": int(models.add(one, self.scores[one.step]))}
        except FileNotFoundError:
            if one.folder.exists():  # else it was let go of since it was looked at
                raise
            return {}

    def _send_files(self, files: Mapping[Path, Any], models: Models) -> dict[str, int]:
        before, missing = self.brought.get("its files", {}), 0
        for folder, place in ((self.run.folder, ""), (self.run.plots, "plots")):
            new = [path for path in files if path.parent == folder and before.get(path) != files[path]]
            missing += models.mlflow.files.bring(new, place, again=not place)
        return {"files": missing}


def update(run: Run, store: Store, own: bool = True) -> Counter[str]:
    """`Mirror.update` of a run that no process is making; its files name the id of a store that is its ``own``."""
    return Mirror(run, store, None if own else lambda run_id: None).update()


def record_of(run: Run) -> MlflowRecord | None:
    """What makes the MLflow run; None where it was never announced."""
    record = records.read(MlflowRecord, run.folder)
    return record if record is not None and record.started else None  # of a file that is torn nothing is known


def renoted(record: MlflowRecord, note: str) -> MlflowRecord:
    """With another description; that MLflow has an earlier one is known, so an edited one can be told."""
    before = record.tags.get(NOTE)
    notes = record.notes if before in (None, note) else [*record.notes, before]
    return replace(record, tags=record.tags | {NOTE: note}, notes=notes)


def _keep_id(run: Run, run_id: str) -> None:
    for kind in (MlflowRecord, Result):
        if (record := records.read(kind, run.folder)) is not None:
            records.write(replace(record, run_id=run_id), run.folder)


def _ended_at(run: Run, started: int) -> int:
    """When a run that could not say so ended, in milliseconds since 1970: at its last number or sign of life."""
    if rows := run.metrics():
        return records.milliseconds_of(rows[-1]["time"])
    heartbeat = run.folder / ProcessRecord.FILE
    return max(started, int(heartbeat.stat().st_mtime * 1000)) if heartbeat.is_file() else started


def batches(metrics: Path, start: int) -> Iterator[list[bytes]]:
    """Lines of metrics.jsonl from a byte on, up to its length now; one that is being written is left for later.

    They are on the disk when they are given: MLflow must not know a number that a power cut could take from the file.
    """
    if not metrics.is_file():
        return
    with metrics.open("rb") as file:
        end = os.fstat(file.fileno()).st_size  # what is added meanwhile waits: it must not keep anything else waiting
        file.seek(start)
        os.fsync(file.fileno())
        while file.tell() < end and (lines := file.readlines(min(65_536, end - file.tell()))):  # some 1,000 points
            if whole := [line for line in lines if line.endswith(b"\n")]:
                yield whole
            if len(whole) < len(lines):
                return
