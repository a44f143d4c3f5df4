"""``sync`` brings MLflow to what a run's folder says, however much of it is there already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlmx import alive, tracking
from mlmx.cli import main
from mlmx.runs import Run
from tests.test_resume import command, history, same
from tests.test_tracking import history as stored
from tests.test_tracking import logged

pytestmark = pytest.mark.timeout(300)


def of(outputs: Path):
    """The one MLflow run of the local store."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking.local().uri)
    [run] = client.search_runs([client.get_experiment_by_name("mlmx").experiment_id])
    return client, run


class Made:
    """What `stored` and `logged` ask of a tracker."""

    def __init__(self, folder: Path) -> None:
        self.run = Run(folder)
        self.status = self.run.status
        self.run_id = self.run.read_json("result.json")["run_id"]


Points = list[tuple[str, int, int, float]]


def points(folder: Path) -> tuple[Points, Points]:
    """What MLflow has and what metrics.jsonl says, the epoch aside, which MLflow has once a step."""
    made = Made(folder)
    both = stored(tracking.local(), made), logged(made)
    there, wanted = ([point for point in found if point[0] != "epoch"] for found in both)
    return there, wanted


EVERY_FIFTH = ["trainer.save_steps=5", "tracking=local"]


@pytest.fixture
def offline(store: Path, tiny: Path, corpus: Path, outputs: Path, monkeypatch, capsys) -> Path:
    """A run whose MLflow was away all the time."""
    folder = outputs / "train" / "offline"
    monkeypatch.setattr(tracking.writer, "PATIENCE_SECONDS", 0.1)
    with monkeypatch.context() as away:
        away.setattr("mlmx.tracking.mlflow_run.connect", lambda store: 1 / 0)
        assert main([*command(tiny, corpus, folder), *EVERY_FIFTH]) == 0
    assert f"later: python -m mlmx sync run={folder}" in capsys.readouterr().out
    return folder


def test_a_run_that_mlflow_missed_is_sent_whole_and_only_once(offline: Path, outputs: Path, capsys):
    assert main(["sync", "run=last"]) == 0
    assert "1 run" in (said := capsys.readouterr().out)
    assert "4 models" in said
    client, run = of(outputs)
    assert run.info.status == "FINISHED"
    assert run.data.params["chunk_size"] == "24"
    assert len(run.inputs.dataset_inputs) == 3
    there, wanted = points(offline)
    assert there == wanted
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"metrics.jsonl", "config.yaml", "plots"}
    assert Run(offline).read_json("result.json")["run_id"] == run.info.run_id
    assert main(["sync", f"run={offline}"]) == 0
    assert "has all of it" in capsys.readouterr().out
    assert points(offline) == (there, wanted)


def test_a_resumed_run_goes_on_in_its_own_mlflow_run(offline: Path, outputs: Path):
    """Killed after step 12 with its numbers up to step 14 on record: what it repeats comes once."""
    whole = shutil.copytree(offline, outputs.parent / "whole")
    assert main(["sync", "run=last"]) == 0
    before = of(outputs)[1].info.run_id
    for gone in ("model", "plots", "checkpoints/checkpoint-15", "checkpoints/checkpoint-20"):
        shutil.rmtree(offline / gone)
    lines = (offline / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 14]
    (offline / "metrics.jsonl").write_text("".join(kept) + '{"step": 15, "tra', encoding="utf-8")
    Run(offline).write_json("result.json", Run(offline).read_json("result.json") | {"status": "RUNNING"})
    assert not alive.is_alive(Run(offline))
    assert main(["train", f"resume={offline}"]) == 0
    _, run = of(outputs)
    assert (run.info.run_id, run.info.status) == (before, "FINISHED")
    assert history(offline) == history(whole)
    assert same(offline / "model/model.safetensors", whole / "model/model.safetensors")
    # what MLflow had of steps 15 to 20 stays beside what the resumed run logged again: same values, another time
    there, wanted = points(offline)
    assert {point[:2] for point in there} == {point[:2] for point in wanted}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run=last"], "run=last: no run below"),
        (["run=nope"], "run=nope: no such run"),
        (["run=last", "tracking=nowhere"], "tracking=nowhere: no such option"),
    ],
)
def test_what_cannot_be_sent_is_refused_in_one_line(arguments: list[str], said: str, outputs: Path, capsys):
    assert main(["sync", *arguments]) == 2
    assert said in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert not outputs.exists()


def test_a_server_that_is_away_is_said_in_one_line(offline: Path, capsys):
    assert main(["sync", "run=last", "tracking=server", "tracking.uri=http://127.0.0.1:9"]) == 1
    error = capsys.readouterr().err
    assert "http://127.0.0.1:9 did not take it" in error
    assert error.count("\n") == 1
