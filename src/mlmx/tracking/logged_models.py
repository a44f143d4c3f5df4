"""The models of a run in MLflow: every saved checkpoint, and the final model, as a LoggedModel that one line loads.

The best and the last of a finished run become versions of one name in MLflow's registry. Who is ``best`` there follows
from the versions alone, so that runs that end together, or are sent late, come to the same: ``last`` is the last
checkpoint of the run that ended last; ``best`` has the lowest loss of all versions that were measured as that one was
(by one protocol and one metric).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException

from mlmx.runs import checkpoints
from mlmx.tracking.artifacts import Artifacts
from mlmx.tracking.mlflow_run import MlflowRun, as_kept
from mlmx.tracking.model_files import (
    CHECKPOINT,
    FINAL,
    MODEL,
    STEP,
    TOKENIZER,
    Saved,
    Score,
    descriptions,
    model_files,
    place_of,
)
from mlmx.tracking.store import pages

REGISTERED = "mlmx.registered"
VERSIONS = "mlflow.modelVersions"  # set by MLflow, also where a person registers a model in its UI
BEST, LAST = "best", "last"
MODEL_ID, PROTOCOL, METRIC, LOSS, ENDED = "mlmx.model_id", "mlmx.protocol", "mlmx.metric", "mlmx.loss", "mlmx.ended"
ATTEMPTS = 10  # to set the aliases while others do
VERSIONS_AT_ONCE = 200  # as many as MLflow gives
Key = tuple[str, str]  # name and step


@dataclass
class Known:
    """A LoggedModel and what of it is there."""

    model_id: str
    address: str
    tags: dict[str, str]
    ready: bool
    scored: set[str]
    files: Artifacts
    linked: bool = False


class Models:
    """The LoggedModels of a run; every method raises what the store raises, and may then be called again.

    Args:
        mlflow: the run, whose ``datasets`` the scores of a model are linked to.
    """

    def __init__(self, mlflow: MlflowRun) -> None:
        self.mlflow, self.client = mlflow, mlflow.client
        self.known: dict[Key, Known] | None = None

    def add(self, saved: Saved, scores: Mapping[str, Score]) -> bool:
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
                if found.setdefault((one.name, one.tags.get(STEP, "")), known := self._known(one)) is not known:
                    self._remove(known)
            run = self.client.get_run(self.mlflow.run_id)
            outputs = {one.model_id for one in (run.outputs.model_outputs if run.outputs else [])}
            for known in found.values():
                known.linked = known.model_id in outputs
            self.known = found
        return self.known

    def keep(self, names: Iterable[str]) -> dict[str, int]:
        """Remove the models of other checkpoints, but for those in the registry: the folder has none of them either."""
        kept = {*names, None}
        self._remove_where(lambda _, known: known.tags.get(CHECKPOINT) not in kept)
        return {}

    # ---------------------------------------------------------------------------------------- adding

    def _add(self, saved: Saved, scores: Mapping[str, Score]) -> bool:
        key = saved.name, str(saved.step)
        known = self.all().get(key)
        if missing := known is None:
            known = self._create(saved)
            self.all()[key] = known
        assert known is not None
        placed = self._place(saved.folder, known)
        if not known.ready:
            self.client.finalize_logged_model(known.model_id, "READY")
            known.ready, missing = True, True
        scored = self._score(known, saved.step, scores)
        if not known.linked:  # MLflow then gives it the scores of its step that it has not, without their datasets
            self.client.log_outputs(self.mlflow.run_id, [LoggedModelOutput(known.model_id, saved.step)])
            known.linked, missing = True, True
        if saved.final:
            self._remove_where(lambda name, other: name == FINAL and other is not known)
        return bool(missing or placed or scored)

    def _create(self, saved: Saved) -> Known:
        record = self.mlflow.record
        tags = saved.tags | {key: record.tags[key] for key in (PROTOCOL, "mlmx.folder") if key in record.tags}
        made = self.client.create_logged_model(
            self.mlflow.experiment, saved.name, self.mlflow.run_id, tags, dict(record.params), "fill-mask"
        )
        return self._known(made)

    def _place(self, folder: Path, known: Known) -> int:
        """What is lacking of its files; returns how many were."""
        files, missing = model_files(folder), 0
        for place in (MODEL, TOKENIZER):
            lacking = known.files.lacking([path for path in files if place_of(path) == place], place)
            for path in lacking:
                known.files.put(path, place)
            missing += len(lacking)
        texts = descriptions(folder, files, known.model_id, self.mlflow.run_id)
        there = known.files.names() if known.ready else ()
        unsaid = {name: text for name, text in texts.items() if name not in there}
        known.files.write(unsaid)
        return missing + len(unsaid)

    def _score(self, known: Known, step: int, scores: Mapping[str, Score]) -> int:
        """Its scores, as the very points that the run has, so that those are there once; returns how many were not
        there. What is not finite is left out: a model's NaN would be kept as 0."""
        refused = known.scored | self.mlflow.refused
        wanted = {name: point for name, point in scores.items() if name not in refused and math.isfinite(point[0])}
        metrics = []
        for name, (value, milliseconds) in wanted.items():
            at = self.mlflow.has.get(as_kept(name, step, value), milliseconds)  # a resumed training says it again
            dataset, digest = self.mlflow.datasets.get(name.partition("/")[0], (None, None))
            metrics.append(Metric(name, value, at, step, known.model_id, dataset, digest))
        if metrics:
            self.client.log_batch(self.mlflow.run_id, metrics=metrics)
        known.scored |= set(wanted)
        return len(metrics)

    # -------------------------------------------------------------------------------------- removing

    def _remove_where(self, unwanted: Callable[[str, Known], bool]) -> None:
        for (name, step), known in list(self.all().items()):
            if unwanted(name, known) and not self._is_registered(known):
                self._remove(known)
                self.all().pop((name, step), None)

    def _is_registered(self, known: Known) -> bool:
        return bool({REGISTERED, VERSIONS} & self.client.get_logged_model(known.model_id).tags.keys())

    def _remove(self, known: Known) -> None:
        """The model and its files; what the run says of its step stays."""
        self.client.delete_logged_model(known.model_id)
        known.files.remove()

    def _found(self) -> list[LoggedModel]:
        """Oldest first."""
        of_the_run = f"source_run_id = '{self.mlflow.run_id}'"
        found = pages(partial(self.client.search_logged_models, [self.mlflow.experiment], of_the_run))
        return sorted(found, key=lambda one: (one.creation_timestamp, one.model_id))

    def _known(self, one: LoggedModel) -> Known:
        files = Artifacts(one.artifact_location, self.client.tracking_uri)
        scored = {metric.key for metric in one.metrics or []}
        return Known(one.model_id, one.artifact_location, dict(one.tags), str(one.status) == "READY", scored, files)


# ---------------------------------------------------------------------------------------------- the registry


@dataclass(frozen=True)
class Version:
    """A version of a registered model, with what its tags say."""

    number: str
    tags: Mapping[str, str]

    @property
    def place(self) -> tuple[int, int, int]:
        """Versions by the end of their run, then by step."""
        return int(self.tags[ENDED]), int(self.tags[STEP]), int(self.number)

    @property
    def measured(self) -> tuple[str | None, str | None]:
        """What its loss can be compared by."""
        return self.tags.get(PROTOCOL), self.tags.get(METRIC)

    @property
    def loss(self) -> float:
        """NaN where it has none."""
        return float(self.tags.get(LOSS, "nan"))


def aliases_of(versions: Iterable[Version]) -> dict[str, str]:
    """Alias and number of version.

    >>> old = Version("1", {"mlmx.ended": "5", "mlmx.step": "9", "mlmx.protocol": "a", "mlmx.loss": "2.5"})
    >>> new = Version("2", {"mlmx.ended": "8", "mlmx.step": "9", "mlmx.protocol": "a", "mlmx.loss": "2.6"})
    >>> aliases_of([old, new])
    {'last': '2', 'best': '1'}
    """
    own = list(versions)
    if not own:
        return {}
    last = max(own, key=lambda one: one.place)
    peers = [one for one in own if one.measured == last.measured and math.isfinite(one.loss)]
    best = min(peers, key=lambda one: (one.loss, int(one.number)), default=None)
    return {LAST: last.number} | ({BEST: best.number} if best else {})


def register(
    models: Models, name: str, saved: Iterable[Saved], scores: Mapping[int, Mapping[str, Score]], ended: int
) -> int:
    """The best and the last of a finished run's models as versions of ``name``; returns how many were not there.

    Args:
        scores: of each step that was scored.
        ended: milliseconds since 1970.

    Raises:
        LookupError: none of the run's models is in MLflow.
        Exception: what MLflow raises; it can be called again.
    """
    by_step = candidates(models.all(), saved)
    if not by_step:
        raise LookupError("MLflow has none of the models to register")
    losses = {step: {name: value for name, (value, _) in scores.get(step, {}).items()} for step in by_step}
    best, last = checkpoints.best_step(losses), max(by_step)
    there = {one.tags.get(MODEL_ID) for one in versions_of(models.client, name)}
    metric = checkpoints.loss_name(losses.values())
    made = 0
    for step in dict.fromkeys([last if best is None else best, last]):
        known = by_step[step]
        if known.model_id not in there:
            loss = {METRIC: metric, LOSS: repr(losses[step][metric])} if metric and metric in losses[step] else {}
            own = {MODEL_ID: known.model_id, ENDED: str(ended), STEP: str(step), **loss}
            _add_version(models, name, known, {key: known.tags[key] for key in (PROTOCOL,) if key in known.tags} | own)
            made += 1
    _set_aliases(models.client, name)
    return made


def candidates(known: Mapping[tuple[str, str], Known], saved: Iterable[Saved]) -> dict[int, Known]:
    """What may be registered, by step: the checkpoints, and the final model where its step has none."""
    order = sorted(saved, key=lambda one: not one.final)
    found = {one.step: known.get((one.name, str(one.step))) for one in order}
    return {step: one for step, one in found.items() if one is not None and one.ready}


def versions_of(client: MlflowClient, name: str) -> list[Version]:
    """The versions of a registered model that runs of ours have made."""
    found = pages(partial(client.search_model_versions, f"name='{name}'", max_results=VERSIONS_AT_ONCE))
    return [Version(str(one.version), dict(one.tags)) for one in found if ENDED in one.tags]


def _add_version(models: Models, name: str, known: Known, tags: Mapping[str, Any]) -> None:
    try:
        models.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    models.client.set_logged_model_tags(known.model_id, {REGISTERED: name})  # first: from here on its files stay
    known.tags[REGISTERED] = name
    made = models.client.create_model_version(
        name, known.address, models.mlflow.run_id, tags=dict(tags), await_creation_for=0, model_id=known.model_id
    )
    # What the model's page shows; a server has written it itself.
    listed = json.loads(models.client.get_logged_model(known.model_id).tags.get(VERSIONS, "[]"))
    one = {"name": name, "version": made.version}
    if one not in listed:
        models.client.set_logged_model_tags(known.model_id, {VERSIONS: json.dumps([*listed, one])})


def _set_aliases(client: MlflowClient, name: str) -> None:
    """Looked at again after each change: whoever sets an alias last has seen every version made before."""
    for _ in range(ATTEMPTS):
        wanted = aliases_of(versions_of(client, name))
        there = {alias: str(number) for alias, number in client.get_registered_model(name).aliases.items()}
        wrong = {alias: number for alias, number in wanted.items() if there.get(alias) != number}
        if not wrong:
            return
        for alias, number in wrong.items():
            client.set_registered_model_alias(name, alias, number)
    raise RuntimeError(f"the aliases of {name} were set by others again and again")
