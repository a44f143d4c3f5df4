"""MLflow's model registry: the best and the last checkpoint of a run as versions of one name, and who is ``best``.

The aliases follow from the versions alone, so that runs that end together, or are sent late, come to the same:
``last`` is the last checkpoint of the run that ended last; ``best`` has the lowest loss of all versions that were
measured as that one was (by one protocol and one metric).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlmx.runs import checkpoints
from mlmx.tracking.logged_models import REGISTERED, STEP, VERSIONS, Known, Saved, Scores

if TYPE_CHECKING:
    from mlmx.tracking.mlflow_run import MlflowRun

BEST, LAST = "best", "last"
MODEL_ID, PROTOCOL, METRIC, LOSS, ENDED = "mlmx.model_id", "mlmx.protocol", "mlmx.metric", "mlmx.loss", "mlmx.ended"
ATTEMPTS = 10  # to set the aliases while others do
PAGE = 200


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


def register(mlflow: MlflowRun, name: str, saved: Iterable[Saved], scores: Scores, ended: int) -> int:
    """The best and the last of a finished run's models as versions of ``name``; returns how many were not there.

    Args:
        ended: milliseconds since 1970.

    Raises:
        LookupError: none of the run's models is in MLflow.
        Exception: what MLflow raises; it can be called again.
    """
    by_step = candidates(mlflow.models.all(), saved)
    if not by_step:
        raise LookupError("MLflow has none of the models to register")
    measured = scores.losses()
    losses = {step: measured.get(step, {}) for step in by_step}
    best, last = checkpoints.best_step(losses), max(by_step)
    there = {one.tags.get(MODEL_ID) for one in versions_of(mlflow, name)}
    metric = checkpoints.loss_name(losses.values())
    made = 0
    for step in dict.fromkeys([last if best is None else best, last]):
        known = by_step[step]
        if known.model_id not in there:
            loss = {METRIC: metric, LOSS: repr(losses[step][metric])} if metric and metric in losses[step] else {}
            own = {MODEL_ID: known.model_id, ENDED: str(ended), STEP: str(step), **loss}
            _add_version(mlflow, name, known, {key: known.tags[key] for key in (PROTOCOL,) if key in known.tags} | own)
            made += 1
    _set_aliases(mlflow, name)
    return made


def candidates(known: Mapping[tuple[str, str], Known], saved: Iterable[Saved]) -> dict[int, Known]:
    """What may be registered, by step: the checkpoints, and the final model where its step has none."""
    order = sorted(saved, key=lambda one: not one.final)
    found = {one.step: known.get((one.name, str(one.step))) for one in order}
    return {step: one for step, one in found.items() if one is not None and one.ready}


def versions_of(mlflow: MlflowRun, name: str) -> list[Version]:
    """The versions of a registered model that runs of ours have made."""
    found: list[Version] = []
    token = None
    while True:
        page = mlflow.client.search_model_versions(f"name='{name}'", max_results=PAGE, page_token=token)
        found += [Version(str(one.version), dict(one.tags)) for one in page if ENDED in one.tags]
        token = page.token
        if not token:
            return found


def _add_version(mlflow: MlflowRun, name: str, known: Known, tags: Mapping[str, Any]) -> None:
    from mlflow.exceptions import MlflowException

    try:
        mlflow.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    mlflow.client.set_logged_model_tags(known.model_id, {REGISTERED: name})  # first: from here on its files stay
    known.tags[REGISTERED] = name
    made = mlflow.client.create_model_version(
        name, known.address, mlflow.run_id, tags=dict(tags), await_creation_for=0, model_id=known.model_id
    )
    # What the model's page shows; a server has written it itself.
    listed = json.loads(mlflow.client.get_logged_model(known.model_id).tags.get(VERSIONS, "[]"))
    one = {"name": name, "version": made.version}
    if one not in listed:
        mlflow.client.set_logged_model_tags(known.model_id, {VERSIONS: json.dumps([*listed, one])})


def _set_aliases(mlflow: MlflowRun, name: str) -> None:
    """Looked at again after each change: whoever sets an alias last has seen every version made before."""
    for _ in range(ATTEMPTS):
        wanted = aliases_of(versions_of(mlflow, name))
        there = {alias: str(number) for alias, number in mlflow.client.get_registered_model(name).aliases.items()}
        wrong = {alias: number for alias, number in wanted.items() if there.get(alias) != number}
        if not wrong:
            return
        for alias, number in wrong.items():
            mlflow.client.set_registered_model_alias(name, alias, number)
    raise RuntimeError(f"the aliases of {name} were set by others again and again")
