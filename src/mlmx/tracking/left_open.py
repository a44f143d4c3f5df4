"""MLflow runs that say RUNNING, and closing those that nobody is at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlmx.tracking.mlflow_run import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from mlmx.tracking.store import Store

PAGE = 1000


@dataclass(frozen=True)
class OpenRun:
    """An MLflow run that says RUNNING; ``started`` in milliseconds since 1970."""

    run_id: str
    started: int
    tags: dict[str, str]


def open_runs(store: Store) -> list[OpenRun]:
    """All of the store, whoever made them; raises what MLflow raises."""
    client = _client(store)
    experiments = [experiment.experiment_id for experiment in client.search_experiments(max_results=PAGE)]
    found: list[OpenRun] = []
    token = None
    while True:
        page = client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=PAGE, page_token=token)
        found += [OpenRun(run.info.run_id, run.info.start_time, dict(run.data.tags)) for run in page]
        token = page.token
        if not token:
            return found


def close(store: Store, run_id: str, status: str) -> None:
    """Only the status; raises what MLflow raises."""
    _client(store).set_terminated(run_id, status)


def _client(store: Store) -> MlflowClient:
    return connect(store)[0]
