"""Tracking: local files first; whatever MLflow does, a run goes on and its status is the truth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlmx.commands import main
from mlmx.config.errors import RequestError
from mlmx.runs.run import Run, all_runs
from mlmx.tracking import follower
from mlmx.tracking.store import local, server
from mlmx.tracking.tracker import Tracker
from tests.support.made_runs import checkpoint
from tests.support.tracked import history, logged, tracker, until


def test_numbers_reach_the_folder_and_the_store(store: Path, outputs: Path):
    from mlflow import MlflowClient

    made = tracker(outputs / "run", local())
    made.log(0, 0.0, {"eval/loss": 3.0})
    made.log(7, 1.0, {"eval/loss": 2.0, "train/loss": 2.5})
    made.finish("FINISHED", {"total": 1.0})

    rows = Run(outputs / "run").metrics()
    client = MlflowClient(local().uri)
    history = client.get_metric_history(made.run_id, "eval/loss")
    assert (
        [(p.step, p.value) for p in history]
        == [(row["step"], row["eval/loss"]) for row in rows]
        == [(0, 3.0), (7, 2.0)]
    )
    assert [p.value for p in client.get_metric_history(made.run_id, "epoch")] == [0.0, 1.0]
    run = client.get_run(made.run_id)
    assert (run.info.status, run.info.run_name, run.data.params) == ("FINISHED", "a name", {"lr": "1e-05"})
    inputs = {tag.value: one.dataset.digest for one in run.inputs.dataset_inputs for tag in one.tags}
    assert inputs == {"training": ("ab" * 32)[:36], "validation": ("ab" * 32)[:36]}
    result = json.loads((outputs / "run" / "result.json").read_text())
    assert result["status"] == "FINISHED"
    assert result["run_id"] == made.run_id
    assert result["metrics"] == {"eval/loss": 2.0, "train/loss": 2.5}
    assert {"run_name", "command", "protocol", "seconds"} <= set(result)


def test_the_experiment_and_its_artifacts_lie_at_absolute_addresses(store: Path, outputs: Path, monkeypatch, tmp_path):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    made = tracker(outputs / "run", local(experiment="mine"))
    made.finish("FAILED", {})
    experiment = MlflowClient(local().uri).get_experiment_by_name("mine")
    assert experiment.artifact_location == (outputs / "mlartifacts").as_uri()
    assert not (tmp_path / "mlruns").exists()


def test_weights_are_linked_into_the_store_and_resuming_files_are_not(store: Path, outputs: Path):
    from mlflow import MlflowClient

    made = tracker(outputs / "run", local())
    saved = checkpoint(made.run, 7, 1.0)
    made.checkpoint(saved, 7, 1.0)
    made.finish("FINISHED", {})
    client = MlflowClient(local().uri)
    [output] = client.get_run(made.run_id).outputs.model_outputs
    one = client.get_logged_model(output.model_id)
    assert (one.name, output.step, str(one.status)) == ("epoch-1", 7, "READY")
    folders = ("model", "components/tokenizer")
    listed = [Path(f.path).name for at in folders for f in client.list_logged_model_artifacts(one.model_id, at)]
    assert sorted(listed) == ["config.json", "model.safetensors", "tokenizer.json"]
    (linked,) = (outputs / "mlartifacts").glob(f"models/{one.model_id}/artifacts/model/model.safetensors")
    assert linked.samefile(saved / "model.safetensors"), "weights take their space once"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "RETRY_AFTER_SECONDS", (0.01,))
    monkeypatch.setattr(follower, "PATIENCE_SECONDS", 0.5)


@pytest.mark.usefixtures("impatient")
def test_a_store_that_fails_costs_a_line_not_the_run(outputs: Path, caplog):
    outputs.mkdir()
    (outputs / "mlflow.db").write_text("this is no database")
    made = tracker(outputs / "run", local())
    made.log(1, 0.5, {"train/loss": 1.0})
    made.finish("FINISHED", {})
    assert made.run_id is None
    assert [row["train/loss"] for row in Run(outputs / "run").metrics()] == [1.0]
    assert json.loads((outputs / "run" / "result.json").read_text())["status"] == "FINISHED"
    assert caplog.text.count("MLflow cannot be reached") <= 1
    assert caplog.text.count("MLflow did not get all of this run") == 1
    assert f"2 points, params and datasets, its files, how it ended; all of it is in {made.run.folder}" in caplog.text


@pytest.mark.usefixtures("impatient")
def test_a_store_lost_in_the_middle_is_said_once_and_gets_everything_on_return(store: Path, outputs: Path, caplog):
    made = tracker(outputs / "run", local())
    made.log(1, 0.5, {"train/loss": 1.0})
    until(lambda: made.run_id is not None)  # from here on the follower may be at any point
    gone = store.rename(store.with_name("gone.db"))
    store.mkdir()
    for step in (2, 3):
        made.log(step, 1.0, {"train/loss": 0.5})
    until(lambda: "MLflow cannot be reached" in caplog.text)
    store.rmdir()
    gone.rename(store)
    made.finish("FINISHED", {})
    assert caplog.text.count("MLflow cannot be reached") == 1
    assert "did not get" not in caplog.text
    assert history(local(), made) == logged(made)


@pytest.mark.usefixtures("impatient")
def test_a_store_moved_away_at_the_moment_its_run_is_known_is_missed(store: Path, outputs: Path, said, monkeypatch):
    """Else the open file would be written to under its other name, and what comes to lie there stay empty."""
    opened = Tracker._opened
    gone = store.with_name("gone.db")
    monkeypatch.setattr(
        Tracker, "_opened", lambda self, run_id: (opened(self, run_id), store.rename(gone), store.mkdir())
    )
    made = tracker(outputs / "run", local())
    until(lambda: "MLflow cannot be reached" in said.text)
    store.rmdir()
    gone.rename(store)
    made.finish("FINISHED", {})
    assert history(local(), made) == logged(made)


def test_no_tracking_leaves_no_store(tiny: Path, corpus: Path, outputs: Path):
    sizes = ["dataset.train_chunks=8", "dataset.eval_chunks=4", "chunk_size=16", "epochs=1"]
    assert (
        main.main(["train", f"model.path={tiny}", "dataset=files", f"dataset.path={corpus}", *sizes, "tracking=none"])
        == 0
    )
    assert sorted(path.name for path in outputs.iterdir()) == ["cache", "train"]
    assert all_runs()[0].read_json("result.json")["run_id"] is None


def test_a_server_needs_an_address():
    with pytest.raises(RequestError, match=r"tracking\.uri=localhost.*http://"):
        server(uri="localhost:5000")


def test_of_steps_that_log_at_once_some_are_said_and_all_are_kept(tmp_path: Path, said: pytest.LogCaptureFixture):
    tracker = Tracker(Run(tmp_path), None)
    for step in range(1, 51):
        tracker.log(step, 1.0, {"train/loss": 1.0 / step})
    tracker.log(50, 1.0, {"heldout/loss": 2.5})
    tracker.finish("FINISHED", {})
    assert [row["step"] for row in Run(tmp_path).metrics()] == [*range(1, 51), 50]
    lines = [record.getMessage() for record in said.records]
    assert lines[0] == "epoch 1  step 1  train/loss 1"
    assert lines[-1] == "epoch 1  step 50  heldout/loss 2.5"
    assert len(lines) < 50
