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
from functools import partial

from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException

from mlmx.runs import checkpoints
from mlmx.tracking import model_files
from mlmx.tracking.artifacts import Artifacts
from mlmx.tracking.mlflow_run import MlflowRun, as_kept
from mlmx.tracking.model_files import CHECKPOINT, FINAL, STEP, Saved, Score, place_of
from mlmx.tracking.store import pages

REGISTERED = "mlmx.registered"
VERSIONS = "mlflow.modelVersions"  # set by MLflow, also where a person registers a model in its UI
MODEL_ID, PROTOCOL, METRIC, LOSS, ENDED = "mlmx.model_id", "mlmx.protocol", "mlmx.metric", "mlmx.loss", "mlmx.ended"
Versions = Mapping[int, Mapping[str, str]]  # number → tags


class Known:
    """A LoggedModel and what of it is there."""

    def __init__(self, one: LoggedModel, tracking_uri: str) -> None:
        self.model_id, self.address, self.tags = one.model_id, one.artifact_location, dict(one.tags)
        self.files = Artifacts(self.address, tracking_uri)
        self.scored = {metric.key for metric in one.metrics or []}
        self.ready, self.linked = str(one.status) == "READY", False


class Models:
    """The LoggedModels of a run; every method raises what the store raises, and may then be called again."""

    def __init__(self, mlflow: MlflowRun) -> None:
        self.mlflow, self.client = mlflow, mlflow.client
        self.known: dict[tuple[str, str], Known] | None = None  # by name and step

    def all(self) -> dict[tuple[str, str], Known]:
        """What MLflow has; of what lost answers have doubled, one is left."""
        if self.known is None:
            known: dict[tuple[str, str], Known] = {}
            run = self.client.get_run(self.mlflow.run_id)
            outputs = {output.model_id for output in (run.outputs.model_outputs if run.outputs else [])}
            of_the_run = f"source_run_id = '{self.mlflow.run_id}'"
            found = pages(partial(self.client.search_logged_models, [self.mlflow.experiment], of_the_run))
            for model in sorted(found, key=lambda one: (one.creation_timestamp, one.model_id)):
                one = Known(model, self.client.tracking_uri)
                one.linked = one.model_id in outputs
                if known.setdefault((model.name, one.tags.get(STEP, "")), one) is not one:
                    self._remove(one)
            self.known = known
        return self.known

    def add(self, saved: Saved, scores: Mapping[str, Score]) -> bool:
        """A saved model with its files and the scores of its step; returns whether any of it was not there."""
        try:
            run, step, key = self.mlflow, saved.step, (saved.name, str(saved.step))
            known = self.all().get(key)
            missing = known is None
            if known is None:
                tags = {STEP: key[1], "mlmx.epoch": f"{saved.epoch:g}"}
                tags |= {} if saved.final else {CHECKPOINT: saved.folder.name}
                tags |= {name: run.record.tags[name] for name in (PROTOCOL, "mlmx.folder") if name in run.record.tags}
                given = run.experiment, saved.name, run.run_id, tags, dict(run.record.params), "fill-mask"
                known = Known(self.client.create_logged_model(*given), self.client.tracking_uri)
                self.all()[key] = known
            files = model_files.model_files(saved.folder)
            for place in (model_files.MODEL, model_files.TOKENIZER):
                missing |= known.files.bring([path for path in files if place_of(path) == place], place) > 0
            texts = model_files.descriptions(saved.folder, files, known.model_id, run.run_id)
            unsaid = known.files.write(texts, again=not known.ready)
            if not known.ready:
                self.client.finalize_logged_model(known.model_id, "READY")
            scored = []  # the very points that the run has, so that those are there once
            for name, (value, milliseconds) in scores.items():
                if name not in known.scored | run.refused and math.isfinite(value):  # a NaN would be kept as 0
                    at = run.has.get(as_kept(name, step, value), milliseconds)  # a resumed training says it again
                    dataset, digest = run.datasets.get(name.partition("/")[0], (None, None))
                    scored.append(Metric(name, value, at, step, known.model_id, dataset, digest))
            if scored:
                self.client.log_batch(run.run_id, metrics=scored)
            known.scored |= {metric.key for metric in scored}
            if not known.linked:  # MLflow then gives it the scores of its step that it has not, without their datasets
                self.client.log_outputs(run.run_id, [LoggedModelOutput(known.model_id, step)])
            missing |= bool(unsaid or scored or not known.ready or not known.linked)
            known.ready = known.linked = True
            if saved.final:
                self._remove_where(lambda name, other: name == FINAL and other is not known)
            return missing
        except BaseException:
            self.known = None  # what has arrived all the same is found when it is tried again
            raise

    def keep(self, names: Iterable[str]) -> dict[str, int]:
        """Remove the models of other checkpoints, but for those in the registry: the folder has none of them either."""
        kept = {*names, None}
        try:
            self._remove_where(lambda _, known: known.tags.get(CHECKPOINT) not in kept)
        except BaseException:
            self.known = None  # what was removed without an answer would not be found when it is tried again
            raise
        return {}

    def _remove_where(self, unwanted: Callable[[str, Known], bool]) -> None:
        found = self.all()
        for key, known in [(key, known) for key, known in found.items() if unwanted(key[0], known)]:
            if not {REGISTERED, VERSIONS} & self.client.get_logged_model(known.model_id).tags.keys():
                self._remove(known)
                found.pop(key, None)

    def _remove(self, known: Known) -> None:
        """The model and its files; what the run says of its step stays."""
        self.client.delete_logged_model(known.model_id)
        known.files.remove()

    def register(
        self, name: str, saved: Iterable[Saved], scores: Mapping[int, Mapping[str, Score]], ended: int
    ) -> dict[str, int]:
        """The best and the last of a finished run's models as versions of ``name``, by the ``scores`` of each step that
        was scored; ``ended`` in milliseconds since 1970. Returns how many were not there."""
        order = sorted(saved, key=lambda one: not one.final)  # the final model where its step has no checkpoint
        found = [(one.step, self.all().get((one.name, str(one.step)))) for one in order]
        by_step = {step: known for step, known in found if known is not None and known.ready}
        if not by_step:
            raise LookupError("MLflow has none of the models to register")
        losses = {step: {key: value for key, (value, _) in scores.get(step, {}).items()} for step in by_step}
        best, last = checkpoints.best_step(losses), max(by_step)
        there = {tags.get(MODEL_ID) for tags in self._versions(name).values()}
        metric = checkpoints.loss_name(losses.values())
        added = 0
        for step in dict.fromkeys([last if best is None else best, last]):
            if (known := by_step[step]).model_id not in there:
                tags = {key: known.tags[key] for key in (PROTOCOL,) if key in known.tags}
                tags |= {MODEL_ID: known.model_id, ENDED: str(ended), STEP: str(step)}
                if metric and metric in losses[step]:
                    tags |= {METRIC: metric, LOSS: repr(losses[step][metric])}
                try:
                    self.client.create_registered_model(name)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                self.client.set_logged_model_tags(known.model_id, {REGISTERED: name})  # first: now its files stay
                known.tags[REGISTERED] = name
                given = name, known.address, self.mlflow.run_id, tags
                made = self.client.create_model_version(*given, await_creation_for=0, model_id=known.model_id)
                # What the model's page shows; a server has written it itself.
                listed = json.loads(self.client.get_logged_model(known.model_id).tags.get(VERSIONS, "[]"))
                if (one := {"name": name, "version": made.version}) not in listed:
                    self.client.set_logged_model_tags(known.model_id, {VERSIONS: json.dumps([*listed, one])})
                added += 1
        for _ in range(10):  # looked at again after each change: whoever sets one last has seen every version
            wanted = aliases_of(self._versions(name))
            set_now = {alias: int(number) for alias, number in self.client.get_registered_model(name).aliases.items()}
            wrong = {alias: number for alias, number in wanted.items() if set_now.get(alias) != number}
            if not wrong:
                return {"versions": added}
            for alias, number in wrong.items():
                self.client.set_registered_model_alias(name, alias, str(number))
        raise RuntimeError(f"the aliases of {name} were set by others again and again")

    def _versions(self, name: str) -> Versions:
        """The versions of a registered model that runs of ours have made."""
        most = 200  # that MLflow gives at a time
        found = pages(partial(self.client.search_model_versions, f"name='{name}'", max_results=most))
        return {int(one.version): dict(one.tags) for one in found if ENDED in one.tags}


def aliases_of(versions: Versions) -> dict[str, int]:
    """Alias and number of version.

    >>> old = {"mlmx.ended": "5", "mlmx.step": "9", "mlmx.protocol": "a", "mlmx.loss": "2.5"}
    >>> aliases_of({1: old, 2: old | {"mlmx.ended": "8", "mlmx.loss": "2.6"}})
    {'last': 2, 'best': 1}
    """
    if not versions:
        return {}
    last = max(versions, key=lambda number: (int(versions[number][ENDED]), int(versions[number][STEP]), number))
    measured = [versions[last].get(key) for key in (PROTOCOL, METRIC)]
    peers = {n: tags for n, tags in versions.items() if [tags.get(key) for key in (PROTOCOL, METRIC)] == measured}
    losses = {number: float(tags.get(LOSS, "nan")) for number, tags in peers.items()}
    finite = [number for number, loss in losses.items() if math.isfinite(loss)]
    best = {"best": min(finite, key=lambda number: (losses[number], number))} if finite else {}
    return {"last": last} | best
