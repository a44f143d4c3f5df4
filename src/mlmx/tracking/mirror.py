"""Bring MLflow to what a run's folder says: what a server that was away, or a process that was killed, left undone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlmx.config.errors import RequestError
from mlmx.runs.metrics_file import rows_of
from mlmx.runs.provenance import DIFF_FILE, NOTE, PACKAGES_FILE, resumed_name
from mlmx.runs.run import EXAMPLES_FILE, HELDOUT_FILE, Run
from mlmx.tracking.logged_models import Saved, Scores
from mlmx.tracking.registry import register
from mlmx.tracking.writer import batches

if TYPE_CHECKING:
    from mlmx.tracking.mlflow_run import MlflowRun
    from mlmx.tracking.store import Store

# {"name", "tags", "params", "started", "ended", "run_id", "register", "kept"}: all that makes the MLflow run
RUN_FILE = "mlflow.json"
RECORDS = ("config.yaml", "overrides.yaml", "data.json", "metrics.jsonl", "result.json", "train.log")
LINEAGE = (PACKAGES_FILE, resumed_name(PACKAGES_FILE), DIFF_FILE, resumed_name(DIFF_FILE))
FILES = (*RECORDS, *LINEAGE, EXAMPLES_FILE, HELDOUT_FILE)


def send(run: Run, store: Store, own: bool = True) -> dict[str, int]:
    """Make MLflow hold what the folder of a run holds that no process is making; what is there already stays.

    Args:
        own: the store is that of the run, whose id its files name.

    Returns:
        How many were missing there: runs, params, tags, datasets, points, models, files, versions, endings.

    Raises:
        RequestError: the run was never announced to any store.
        Exception: what MLflow raises.
    """
    from mlmx.tracking.mlflow_run import MlflowRun, connect

    told = run.read_json(RUN_FILE)
    if not told:
        raise RequestError(f"{run.folder}: has no {RUN_FILE}; the run ended before it had anything to send")
    client, experiment = connect(store)
    mlflow = MlflowRun(client, experiment, told, again=True)
    mlflow.ping()
    result = run.read_json("result.json")
    if own and mlflow.run_id != told["run_id"]:
        run.write_json(RUN_FILE, told | {"run_id": mlflow.run_id})
        run.write_json("result.json", result | {"run_id": mlflow.run_id})
    missing = {"runs": int(mlflow.made), **mlflow.describe(run.read_json("data.json"))}
    missing["points"] = send_points(mlflow, run.folder / "metrics.jsonl")
    finished = result["status"] == "FINISHED"
    scores = Scores(run.metrics())
    missing["models"] = send_models(mlflow, run, scores, finished)
    if told.get("kept") is not None:  # what the run has let go of, MLflow lets go of
        mlflow.models.keep({*told["kept"], *(folder.name for folder in run.saved())})
    missing["files"] = send_files(mlflow, run)
    missing["versions"] = missing["endings"] = 0
    ended = told.get("ended") or ended_at(run, told["started"])
    if finished and told.get("register"):
        missing["versions"] = register(mlflow, told["register"], saved_models(run, True), scores, ended)
    if result["status"] != "RUNNING":
        missing["endings"] = int(mlflow.finish(result["status"], bool(result.get("resumable")), ended))
    return missing


def replace_note(told: dict[str, Any], note: str) -> None:
    """Give mlflow.json another description; that MLflow has an earlier one is known, so an edited one can be told."""
    before = told["tags"].get(NOTE)
    if before not in (None, note):
        told["notes"] = [*told.get("notes", []), before]
    told["tags"][NOTE] = note


def send_points(mlflow: MlflowRun, metrics: Path) -> int:
    """Every row of metrics.jsonl; returns how many points were missing."""
    if not metrics.is_file():
        return 0
    return sum(mlflow.log(rows_of(lines)) for lines in batches(metrics, 0))


def send_files(mlflow: MlflowRun, run: Run) -> int:
    """The run's small files and plots, as they are now; returns how many were missing or different."""
    files, plots = files_of(run)
    missing = len(mlflow.lacking(files)) + len(lacking_plots := mlflow.lacking(plots, "plots"))
    for path in files:  # a server tells sizes only, and another status may have the same
        mlflow.add_file(path)
    for path in lacking_plots:
        mlflow.add_file(path, "plots")
    return missing


def files_of(run: Run) -> tuple[list[Path], list[Path]]:
    """The small files of a run that MLflow gets, and its plots."""
    files = [path for name in FILES if (path := run.folder / name).is_file()]
    return files, sorted(run.plots.glob("*.png"))


def send_models(mlflow: MlflowRun, run: Run, scores: Scores, final: bool) -> int:
    """The models of all checkpoints that are on the disk; returns how many of them were not there as a whole.

    Args:
        final: and the model of the run, which has finished.
    """
    return sum(mlflow.add_model(saved, scores.at.get(saved.step, {})) for saved in saved_models(run, final))


def saved_models(run: Run, final: bool) -> list[Saved]:
    """The checkpoints of a run and, where it has finished, its model."""
    found = []
    for folder in run.saved():
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        found.append(Saved(folder, int(folder.name.rpartition("-")[2]), state["epoch"]))
    rows = run.metrics() if final and run.model.is_dir() else []
    return [*found, *(Saved(run.model, row["step"], row["epoch"], final=True) for row in rows[-1:])]


def ended_at(run: Run, started: int) -> int:
    """When a run that could not say so ended, in milliseconds since 1970: at its last number."""
    from datetime import datetime

    rows = run.metrics()
    return int(datetime.fromisoformat(rows[-1]["time"]).timestamp() * 1000) if rows else started
