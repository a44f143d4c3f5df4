"""``sync`` brings MLflow to what a run's folder says, however much of it is there already."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from mlmx.commands.main import main
from mlmx.runs import process
from mlmx.runs.run import Run
from mlmx.tracking import follower, mirror
from mlmx.tracking.mirror import update
from mlmx.tracking.store import Store, local
from mlmx.tracking.tracker import Tracker
from tests.support.tracked import REPORT, Made, caught_up, ended, log_steps, logged, of, opened, until
from tests.support.tracked import history as stored
from tests.support.trainings import command, history, same

pytestmark = pytest.mark.timeout(300)


Points = list[tuple[str, int, int, float]]


def points(folder: Path) -> tuple[Points, Points]:
    """What MLflow has and what metrics.jsonl says, the epoch aside, which MLflow has once a step."""
    made = Made(folder)
    both = stored(local(), made), logged(made)
    there, wanted = ([point for point in found if point[0] != "epoch"] for found in both)
    return there, wanted


EVERY_FIFTH = ["trainer.save_steps=5", "tracking=local"]


@pytest.fixture
def offline(store: Path, tiny: Path, corpus: Path, outputs: Path, monkeypatch, capsys) -> Path:
    """A run whose MLflow was away all the time."""
    folder = outputs / "train" / "offline"
    monkeypatch.setattr(follower, "PATIENCE_SECONDS", 0.1)
    with monkeypatch.context() as away:
        away.setattr("mlmx.tracking.mirror.connect", lambda store: 1 / 0)
        assert main([*command(tiny, corpus, folder), *EVERY_FIFTH]) == 0
    assert f"later: python -m mlmx sync run={folder}" in capsys.readouterr().out
    return folder


def test_a_run_that_mlflow_missed_is_sent_whole_and_only_once(offline: Path, outputs: Path, capsys):
    assert main(["sync", "run=last"]) == 0
    assert "1 run" in (said := capsys.readouterr().out)
    assert "5 models" in said
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
    assert not process.is_alive(Run(offline))
    assert main(["train", f"resume={offline}"]) == 0
    _, run = of(outputs)
    assert (run.info.run_id, run.info.status) == (before, "FINISHED")
    assert history(offline) == history(whole)
    assert same(offline / "model/model.safetensors", whole / "model/model.safetensors")
    # what MLflow had of steps 15 to 20 and the file had not is not there twice; only clocks say something else
    there, wanted = points(offline)
    assert {point[:2] for point in there} == {point[:2] for point in wanted}
    exact = [point[:2] for point in there if not point[0].startswith(("perf/", "train/tokens_per_second"))]
    assert len(exact) == len(set(exact))


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


# ------------------------------------------------------------------------------ a tracker without a training


def test_an_ending_and_going_on_are_told_as_they_are(store: Path, outputs: Path):
    folder = outputs / "train" / "run"
    first = ended(folder, "KILLED", resumable=True)
    client, run = of(outputs)
    assert (run.info.status, run.data.tags["resumable"]) == ("KILLED", "true")
    assert Run(folder).read_json("result.json")["resumable"] is True

    second = opened(folder)
    until(lambda: client.get_run(first.run_id).info.status == "RUNNING")
    assert "resumable" not in client.get_run(first.run_id).data.tags
    log_steps(second, range(6, 21))
    second.finish("FAILED", {}, resumable=False)
    run = of(outputs)[1]
    assert (run.info.run_id, run.info.status, run.data.tags["resumable"]) == (first.run_id, "FAILED", "false")
    assert [row["step"] for row in Run(folder).metrics()] == list(range(1, 21))

    opened(folder).finish("FINISHED", {})
    run = of(outputs)[1]
    assert (run.info.status, run.data.tags.get("resumable")) == ("FINISHED", None)
    assert (run.info.start_time, run.info.end_time) == tuple(
        Run(folder).read_json("mlflow.json")[name] for name in ("started", "ended")
    )
    assert stored(local(), Made(folder)) == logged(Made(folder))


def test_a_resumed_run_starts_from_the_numbers_of_its_file(store: Path, outputs: Path):
    folder = outputs / "train" / "run"
    ended(folder, "KILLED", resumable=True)
    again = opened(folder)
    assert again.latest == (10, 0.1)
    assert Run(folder).read_json("result.json")["metrics"] == {"train/loss": 3 + 1 / 11, "train/grad_norm": 5.0}
    again.log(4, 0.04, {"train/loss": 3.2, "train/grad_norm": 2.0})  # repeated: the last numbers stay the last
    assert again.last["train/grad_norm"] == 5.0
    again.log(10, 0.1, {"train/loss": 3 + 1 / 11, "eval/loss": 2.0})  # partly repeated
    again.finish("FINISHED", {})
    assert [set(row) - {"step", "epoch", "time"} for row in Run(folder).metrics()[10:]] == [{"eval/loss"}]


def test_a_changed_param_is_a_tag_of_the_resumed_run(store: Path, outputs: Path, said):
    folder = outputs / "train" / "run"
    ended(folder, "KILLED", resumable=True)
    made = Tracker(Run(folder), local())
    made.start("a name", "heldout-1", {"lr": 2e-5}, {"mlmx.folder": str(folder)}, REPORT)
    made.finish("FINISHED", {})
    run = of(outputs)[1]
    assert run.data.params == {"lr": "1e-05"}
    assert run.data.tags["mlmx.resumed.lr"] == "2e-05"
    assert "did not take" not in said.text


def keeps_dying(folder: str, outputs: str, steps: int) -> None:
    """What a training does to its tracker: it goes on a few steps before where it was killed."""
    os.environ["MLMX_OUTPUTS"] = outputs
    follower.SEND_EVERY_SECONDS = 0.01
    made = opened(Path(folder))
    for step in range(max(1, made.latest[0] - 7), steps + 1):
        log_steps(made, range(step, step + 1))
        time.sleep(0.002)
    made.finish("FINISHED", {})


@pytest.mark.long
@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.nightly)])
def test_a_run_killed_again_and_again_is_one_mlflow_run_with_every_point_once(kills: int, store: Path, outputs: Path):
    folder, chance = outputs / "train" / "run", random.Random(kills)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlmx.tracking.mlflow_run", "tests.tracking.test_mirror"])
    for kill in range(kills + 1):
        steps = 100 * kills if kill == kills else 10**9
        before = len(Run(folder).metrics())
        process = context.Process(target=keeps_dying, args=(str(folder), str(outputs), steps))
        process.start()
        if kill < kills:
            least = before + chance.randrange(60)
            until(lambda least=least: len(Run(folder).metrics()) > least)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kill < kills else 0)
    there = stored(local(), Made(folder))
    assert there == logged(Made(folder))
    assert set(Counter((name, step) for name, step, *_ in there).values()) == {1}
    assert of(outputs)[1].data.tags.get("resumable") is None


@pytest.mark.parametrize("command", [["sync", "run=last"], ["doctor"]], ids=lambda command: command[0])
def test_a_run_that_finished_and_was_killed_before_mlflow_knew_is_mended(
    command: list[str], store: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
):
    made = opened(outputs / "train" / "run")
    log_steps(made, range(1, 11))
    until(lambda: caught_up(made))
    assert made.follower is not None
    made.follower.given_up = True
    monkeypatch.setattr(made.follower, "finish", lambda: None)
    log_steps(made, range(11, 21))
    made.finish("FINISHED", {})
    made.follower.look()
    made.follower.thread.join()
    client, _ = of(outputs)
    client.set_tag(made.run_id, "resumable", "true")
    client.update_run(made.run_id, "RUNNING")  # whatever the thread could still bring
    assert main(command) == 0
    run = of(outputs)[1]
    assert (run.info.run_id, run.info.status, run.data.tags.get("resumable")) == (made.run_id, "FINISHED", None)
    assert stored(local(), Made(made.run.folder)) == logged(Made(made.run.folder))


def test_what_a_person_has_changed_in_mlflow_stays(store: Path, outputs: Path):
    made = ended(outputs / "train" / "run")
    client, run = of(outputs)
    client.update_run(run.info.run_id, name="the good one")
    client.set_tag(run.info.run_id, "mlflow.note.content", "kept")
    client.set_tag(run.info.run_id, "mine", "1")
    client.set_tag(run.info.run_id, "mlmx.command", "another")
    assert {name: count for name, count in update(made.run, local()).items() if count} == {"tags": 1}
    tags = of(outputs)[1].data.tags
    assert (tags["mlflow.runName"], tags["mlflow.note.content"], tags["mine"]) == ("the good one", "kept", "1")
    assert tags["mlmx.command"] == "python -m mlmx train"


def test_what_a_store_has_lost_is_put_back(store: Path, outputs: Path, capsys):
    import sqlite3

    made = ended(outputs / "train" / "run")
    [artifact] = (outputs / "mlartifacts").glob("*/artifacts/metrics.jsonl")
    artifact.write_text("damaged")
    with sqlite3.connect(store) as database:
        database.execute("DELETE FROM metrics WHERE step IN (3, 7)")
    database.close()
    assert main(["sync", "run=last"]) == 0
    assert f"{made.run.folder}: 6 points, 1 file sent to sqlite" in capsys.readouterr().out
    assert stored(local(), Made(made.run.folder)) == logged(Made(made.run.folder))
    assert artifact.read_bytes() == (made.run.folder / "metrics.jsonl").read_bytes()


@pytest.fixture
def elsewhere(_store: Path, outputs: Path) -> Store:
    """A store that is not that of any run."""
    outputs.mkdir(exist_ok=True)
    return Store(f"sqlite:///{shutil.copy(_store, outputs / 'other.db')}", "fresh", outputs / "others")


def test_a_store_that_does_not_know_the_run_gets_it_once(store: Path, elsewhere: Store, outputs: Path):
    made = ended(outputs / "train" / "run")
    found = update(made.run, elsewhere, own=False)
    assert (found["runs"], found["points"]) == (1, 30)
    assert sum(update(made.run, elsewhere, own=False).values()) == 0, "found again, though its id is not on record"
    assert Run(made.run.folder).read_json("mlflow.json")["run_id"] == made.run_id
    assert sum(update(made.run, local()).values()) == 0


def test_all_sends_what_can_be_sent_and_says_what_cannot(store: Path, outputs: Path, capsys):
    gone, good, busy = (ended(outputs / "train" / name) for name in ("gone", "good", "busy"))
    client, _ = of_all(outputs)
    client.delete_run(gone.run_id)
    good.run.append_metrics(10, 0.1, {"evaluate/heldout/loss": 1.0})
    with FileLock(busy.run.folder / ".lock"):
        assert main(["sync", "run=all"]) == 1
        shown = capsys.readouterr()
        assert main(["sync", f"run={busy.run.folder}"]) == 1
    assert f"{busy.run.folder}: is in use by another process" in capsys.readouterr().err
    first, second, third = shown.out.splitlines()
    assert first.startswith(f"{gone.run.folder}: ")
    assert f"run {gone.run_id} was deleted in MLflow; mlflow runs restore brings it back" in first
    assert second.startswith(f"{good.run.folder}: 1 point, 1 file sent to sqlite")
    assert third == f"{busy.run.folder}: is in use by another process"
    assert shown.err == "mlmx: 2 of 3 runs were not sent; nothing is lost, run the command again\n"


def of_all(outputs: Path) -> tuple[Any, list[Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(local().uri)
    return client, client.search_runs([client.get_experiment_by_name("mlmx").experiment_id])


def test_a_resumed_run_that_was_deleted_in_mlflow_is_back(store: Path, outputs: Path, monkeypatch):
    folder = outputs / "train" / "run"
    made = ended(folder, "KILLED", resumable=True)
    client, _ = of(outputs)
    client.delete_run(made.run_id)
    own = mirror.connect

    def late(at: Store) -> Any:
        """Where a run is so short that it has ended before MLflow is reached."""
        until(lambda: Run(folder).status == "FINISHED")
        return own(at)

    monkeypatch.setattr(mirror, "connect", late)
    ended(folder)
    assert of(outputs)[1].info.run_id == made.run_id


def test_a_store_that_is_away_is_asked_once(store: Path, outputs: Path, capsys, monkeypatch):
    for name in ("one", "two", "three"):
        ended(outputs / "train" / name)
    asked: list[object] = []

    def connect(at: Store) -> None:
        asked.append(at)
        raise ConnectionError("nobody is there")

    monkeypatch.setattr("mlmx.tracking.mirror.connect", connect)
    assert main(["sync", "run=all"]) == 1
    shown = capsys.readouterr()
    first, second, third = shown.out.splitlines()
    assert "nobody is there" in first
    assert second.endswith("is away")
    assert third.endswith("is away")
    assert "3 of 3 runs were not sent" in shown.err
    assert len(asked) == 1
