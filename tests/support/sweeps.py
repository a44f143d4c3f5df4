"""Small sweeps, and what MLflow has of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def command(tiny: Path, corpus: Path, *more: str) -> list[str]:
    settings = {
        "model.path": tiny,
        "dataset": "files",
        "dataset.path": corpus,
        "dataset.train_chunks": 8,
        "dataset.eval_chunks": 2,
        "heldout.documents": 4,
        "batch_size": 4,
        "epochs": 1,
        "chunk_size": 16,
    }
    given = {one.partition("=")[0] for one in more}
    return ["train", "-m", *(f"{key}={value}" for key, value in settings.items() if key not in given), *more]


def told(outputs: Path) -> tuple[Any, list[Any]]:
    """MLflow's parent and its children, each of which it has once."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("mlmx").experiment_id])
    [parent] = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(found) - 1
    assert len({run.data.tags["mlmx.folder"] for run in children}) == len(children)
    return parent, children
