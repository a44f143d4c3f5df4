"""The models of a run in MLflow: every saved checkpoint, and the final model, as a LoggedModel that one line loads."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mlmx.tracking.model_files import descriptions, is_placed, local_folder, model_files, place, place_of

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

    from mlmx.tracking.mlflow_run import MlflowRun

FINAL = "model"
STEP, CHECKPOINT, REGISTERED = "mlmx.step", "mlmx.checkpoint", "mlmx.registered"
VERSIONS = "mlflow.modelVersions"  # set by MLflow, also where a person registers a model in its UI
SECTIONS = ("eval", "heldout")  # what says how good a model is; the rest is about the steps before it
Point = tuple[float, int]  # value, milliseconds since 1970
Key = tuple[str, str]  # name and step


@dataclass(frozen=True)
class Saved:
    """A saved model of a run: a checkpoint, or the final one."""

    folder: Path
    step: int
    epoch: float
    final: bool = False

    @property
    def name(self) -> str:
        """What MLflow calls it; dots and slashes are not allowed there.

        >>> Saved(Path("checkpoint-7"), 7, 1.0).name, Saved(Path("checkpoint-9"), 9, 1.3).name
        ('epoch-1', 'step-9')
        """
        if self.final:
            return FINAL
        whole = math.isclose(self.epoch, round(self.epoch), abs_tol=1e-6)
        return f"epoch-{round(self.epoch)}" if whole else f"step-{self.step}"

    @property
    def tags(self) -> dict[str, str]:
        """Which of the run's models it is."""
        own = {} if self.final else {CHECKPOINT: self.folder.name}
        return {STEP: str(self.step), "mlmx.epoch": f"{self.epoch:g}", **own}


class Scores:
    """The numbers of those steps that were scored, from rows of metrics.jsonl as they come."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.at: dict[int, dict[str, Point]] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> bool:
        """Another row, and whether it has any; what the same step says later counts."""
        own = [name for name in row if name.partition("/")[0] in SECTIONS]
        if own:
            milliseconds = int(datetime.fromisoformat(row["time"]).timestamp() * 1000)
            self.at.setdefault(row["step"], {}).update({name: (float(row[name]), milliseconds) for name in own})
        return bool(own)

    def losses(self) -> dict[int, dict[str, float]]:
        """Name and value of everything that was measured, by step."""
        return {step: {name: value for name, (value, _) in points.items()} for step, points in self.at.items()}


@dataclass
class Known:
    """A LoggedModel and what of it is there."""

    model_id: str
    address: str
    tags: dict[str, str]
    ready: bool = False
    linked: bool = False
    scored: set[str] = field(default_factory=set)

    @property
    def local(self) -> Path | None:
        """Its files, where the store is local."""
        return local_folder(self.address)


class Models:
    """The LoggedModels of a run; every method raises what the store raises, and may then be called again.

    Args:
        mlflow: the run, whose ``datasets`` the scores of a model are linked to.
    """

    def __init__(self, mlflow: MlflowRun) -> None:
        self.mlflow, self.client = mlflow, mlflow.client
        self.known: dict[Key, Known] | None = {} if mlflow.made and not mlflow.again else None

    def add(self, saved: Saved, scores: Mapping[str, Point]) -> bool:
        """A saved model with its files and the scores of its step; returns whether any of it was not there."""
        try:
            return self._add(saved, scores)
        except BaseException:
            self.known = None  # what has arrived all the same is found when it is tried again
            raise

    def all(self) -> dict[Key, Known]:
        """What MLflow has; of what lost answers have doubled, one is left."""
        if self.known is None:
            found: dict[Key, Known] = {}
            for one in self._found():
                if found.setdefault((one.name, one.tags.get(STEP, "")), known := _known(one)) is not known:
                    self._remove(known)
            run = self.client.get_run(self.mlflow.run_id)
            outputs = {one.model_id for one in (run.outputs.model_outputs if run.outputs else [])}
            for known in found.values():
                known.linked = known.model_id in outputs
            self.known = found
        return self.known

    def keep(self, checkpoints: Iterable[str]) -> None:
        """Remove the models of other checkpoints, but for those in the registry: the folder has none of them either."""
        kept = {*checkpoints, None}
        self._remove_where(lambda _, known: known.tags.get(CHECKPOINT) not in kept)

    # ---------------------------------------------------------------------------------------- adding

    def _add(self, saved: Saved, scores: Mapping[str, Point]) -> bool:
        files, key = model_files(saved.folder), (saved.name, str(saved.step))
        known = self.all().get(key)
        if missing := known is None:
            known = self._create(saved)
            self.all()[key] = known
        assert known is not None
        placed = self._place(saved.folder, files, known, {} if missing else self._sizes(known))
        if not known.ready:
            self.client.finalize_logged_model(known.model_id, "READY")
            known.ready, missing = True, True
        scored = self._score(known, saved.step, scores)
        if not known.linked:  # MLflow then gives it the scores of its step that it has not, without their datasets
            from mlflow.entities import LoggedModelOutput

            self.client.log_outputs(self.mlflow.run_id, [LoggedModelOutput(known.model_id, saved.step)])
            known.linked, missing = True, True
        if saved.final:
            self._remove_where(lambda name, other: name == FINAL and other is not known)
        return bool(missing or placed or scored)

    def _create(self, saved: Saved) -> Known:
        told = self.mlflow.told
        tags = saved.tags | {key: told["tags"][key] for key in ("mlmx.protocol", "mlmx.folder") if key in told["tags"]}
        made = self.client.create_logged_model(
            self.mlflow.experiment, saved.name, self.mlflow.run_id, tags, dict(told["params"]), "fill-mask"
        )
        return _known(made)

    def _place(self, folder: Path, files: list[Path], known: Known, there: Mapping[str, int]) -> int:
        """What is lacking of its files; returns how many were."""
        lacking = [path for path in files if not self._is_there(path, known, there)]
        for path in lacking:
            self._put(path, known, place_of(path))
        texts = descriptions(folder, files, known.model_id, self.mlflow.run_id)
        unsaid = {name: text for name, text in texts.items() if not known.ready or name not in there}
        self._say(unsaid, known)
        return len(lacking) + len(unsaid)

    def _say(self, texts: Mapping[str, str], known: Known) -> None:
        if known.local is not None:
            known.local.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                (known.local / name).write_text(text, encoding="utf-8")
        elif texts:
            with tempfile.TemporaryDirectory(prefix="mlmx-") as aside:
                for name, text in texts.items():
                    (Path(aside) / name).write_text(text, encoding="utf-8")
                self.client.log_model_artifacts(known.model_id, aside)

    def _put(self, path: Path, known: Known, folder: str) -> None:
        if known.local is None:
            self.client.log_model_artifact(known.model_id, str(path), folder or None)
        else:
            place(path, known.local / folder / path.name)

    def _is_there(self, path: Path, known: Known, there: Mapping[str, int]) -> bool:
        """On a server sizes are compared: it keeps no checksums."""
        name = f"{place_of(path)}/{path.name}"
        if known.local is None:
            return there.get(name) == path.stat().st_size
        return is_placed(path, known.local / name)

    def _sizes(self, known: Known) -> dict[str, int]:
        if known.local is not None:  # looked at; to be told by MLflow takes longer
            below = [path for path in known.local.rglob("*") if path.is_file()]
            return {path.relative_to(known.local).as_posix(): path.stat().st_size for path in below}
        found: dict[str, int] = {}
        folders = [""]
        while folders:
            for one in self.client.list_logged_model_artifacts(known.model_id, folders.pop() or None):
                if one.is_dir:
                    folders.append(one.path)
                else:
                    found[PurePosixPath(one.path).as_posix()] = one.file_size or 0
        return found

    def _score(self, known: Known, step: int, scores: Mapping[str, Point]) -> int:
        """Its scores, as the very points that the run has, so that those are there once; returns how many were not
        there. What is not finite is left out: a model's NaN would be kept as 0."""
        from mlflow.entities import Metric

        refused = known.scored | self.mlflow.refused
        wanted = {name: point for name, point in scores.items() if name not in refused and math.isfinite(point[0])}
        metrics = []
        for name, (value, milliseconds) in wanted.items():
            at = self._time_of(name, step, value) or milliseconds
            dataset, digest = self.mlflow.datasets.get(name.partition("/")[0], (None, None))
            metrics.append(Metric(name, value, at, step, known.model_id, dataset, digest))
        if metrics:
            self.client.log_batch(self.mlflow.run_id, metrics=metrics)
        known.scored |= set(wanted)
        return len(metrics)

    def _time_of(self, name: str, step: int, value: float) -> int | None:
        """When the run got a point; a resumed training says it again, at another time."""
        if self.mlflow.made or not self.mlflow.again:
            return None
        history = self.client.get_metric_history(self.mlflow.run_id, name)
        return next((point.timestamp for point in history if (point.step, point.value) == (step, value)), None)

    # -------------------------------------------------------------------------------------- removing

    def _remove_where(self, unwanted: Any) -> None:
        for (name, step), known in list(self.all().items()):
            if unwanted(name, known) and not self._is_registered(known):
                self._remove(known)
                self.all().pop((name, step), None)

    def _is_registered(self, known: Known) -> bool:
        return bool({REGISTERED, VERSIONS} & self.client.get_logged_model(known.model_id).tags.keys())

    def _remove(self, known: Known) -> None:
        """The model and its files; what the run says of its step stays."""
        self.client.delete_logged_model(known.model_id)
        if known.local is None:
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            repository: Any = get_artifact_repository(known.address, tracking_uri=self.client.tracking_uri)
            repository.delete_artifacts()
        elif known.local.parent.name == known.model_id:
            shutil.rmtree(known.local.parent, ignore_errors=True)

    def _found(self) -> list[LoggedModel]:
        """Oldest first."""
        found: list[LoggedModel] = []
        token = None
        while True:
            page = self.client.search_logged_models(
                [self.mlflow.experiment], f"source_run_id = '{self.mlflow.run_id}'", page_token=token
            )
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda one: (one.creation_timestamp, one.model_id))


def _known(one: LoggedModel) -> Known:
    scored = {metric.key for metric in one.metrics or []}
    return Known(one.model_id, one.artifact_location, dict(one.tags), str(one.status) == "READY", scored=scored)
