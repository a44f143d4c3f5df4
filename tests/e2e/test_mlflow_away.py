"""MLflow away, with real servers: whatever becomes of them, MLflow ends up with what metrics.jsonl says, once."""

from __future__ import annotations

import os
import random
import resource
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlmx.commands.main import main
from mlmx.config.schema import TrainConfig
from mlmx.runs.run import Run, begin_run
from mlmx.tracking import follower
from mlmx.tracking import store as stores
from mlmx.tracking.mirror import record_of, update
from mlmx.tracking.tracker import Tracker
from tests.support.made_runs import checkpoint
from tests.support.servers import Server, Way
from tests.support.tracked import REPORT, caught_up, history, logged, until

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture
def way(server: Server) -> Iterator[Way]:
    between = Way(server)
    yield between
    between.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "SEND_EVERY_SECONDS", 0.02)
    monkeypatch.setattr(follower, "RETRY_AFTER_SECONDS", (0.05, 0.2))
    monkeypatch.setattr(follower, "PATIENCE_SECONDS", 1.0)


def tracker(folder: Path, uri: str, **more: Any) -> Tracker:
    """A run's tracker, after `start`, as ``train tracking=server tracking.uri=…`` makes it."""
    begin_run(folder, TrainConfig(tracking={"name": "server", "uri": uri}), (), {})
    made = Tracker(Run(folder), stores.server(uri=uri))
    tags = {"mlmx.command": "python -m mlmx train", "mlmx.folder": str(folder)}
    made.start("a name", "heldout-1", {"lr": 1e-5, "seed": 42}, tags, REPORT, **more)
    return made


def log_steps(made: Tracker, steps: range) -> None:
    for step in steps:
        made.log(step, step / 100, {"train/loss": 3 + 1 / (step + 1), "train/grad_norm": step * 0.5})


def assert_equal(server: Server, made: Tracker) -> None:
    """The server's history is metrics.jsonl: no point twice, none missing."""
    there = history(stores.server(uri=server.uri), made)
    assert there == logged(made)
    assert set(Counter((name, step) for name, step, *_ in there).values()) == {1}


def runs_for(server: Server, folder: Path) -> list[Any]:
    """The MLflow runs of a run folder."""
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    found = client.search_runs([client.get_experiment_by_name("mlmx").experiment_id])
    return [run for run in found if run.data.tags.get("mlmx.folder") == str(folder)]


def models_of(server: Server, made: Tracker) -> dict[str, Path]:
    """Where the files of a run's models are, by name; each is there once, and an output of the run once."""
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    run = client.get_run(made.run.read_json("mlflow.json")["run_id"])
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    assert {str(one.status) for one in found} <= {"READY"}
    outputs = [one.model_id for one in run.outputs.model_outputs]
    assert len(set(outputs)) == len(outputs)
    assert {one.model_id for one in found} <= set(outputs)  # those that were deleted stay in the run's list
    assert len({one.name for one in found}) == len(found)
    return {one.name: server.artifacts / one.artifact_location.partition(":/")[2].lstrip("/") for one in found}


def save(made: Tracker, step: int, epoch: float) -> None:
    """A checkpoint of some size."""
    made.checkpoint(checkpoint(made.run, step, epoch, os.urandom(100_000)), step, epoch)


def in_touch(made: Tracker) -> bool:
    return made.follower is not None and made.follower.mirror.mlflow is not None and made.follower.failures == 0


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.nightly)])
def test_a_server_killed_again_and_again_has_every_point_once(
    kills: int, server: Server, outputs: Path, said: pytest.LogCaptureFixture
):
    made = tracker(outputs / "train" / "run", server.uri)
    at, ended = [0], threading.Event()

    def training() -> None:
        while not ended.is_set():
            at[0] += 1
            log_steps(made, range(at[0], at[0] + 1))
            time.sleep(0.01)

    chance = random.Random(kills)
    thread = threading.Thread(target=training)
    thread.start()
    try:
        for number in range(kills):
            until(lambda: in_touch(made))
            time.sleep(chance.random())
            server.kill()
            save(made, number, number)  # nobody is there to take it
            before = at[0]
            until(lambda before=before: at[0] > before + 20)  # training goes on all the same
            server.start()
        until(lambda: in_touch(made))
    finally:
        ended.set()
        thread.join()
    made.finish("FINISHED", {"total": 1.0})
    assert at[0] > 20 * kills
    assert "did not" not in said.text
    assert_equal(server, made)
    assert len(runs_for(server, made.run.folder)) == 1
    found = models_of(server, made)
    assert set(found) == {f"epoch-{number}" for number in range(kills)}
    for number in range(kills):
        own = made.run.checkpoints / f"checkpoint-{number}" / "model.safetensors"
        assert (found[f"epoch-{number}"] / "model" / "model.safetensors").read_bytes() == own.read_bytes()


FAULTS: dict[str, Callable[[Way], None]] = {
    "refuses with 500": lambda way: setattr(way, "refusal", 500),
    "refuses with 403": lambda way: setattr(way, "refusal", 403),
    "hangs up": lambda way: setattr(way, "hangs_up", True),
    "loses answers": lambda way: setattr(way, "loses_answers", True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_at_the_start_in_the_middle_and_at_the_end_costs_no_number(
    fault: str, way: Way, server: Server, outputs: Path, said: pytest.LogCaptureFixture, capsys
):
    folder = outputs / "train" / "run"
    FAULTS[fault](way)
    made = tracker(folder, way.uri)
    log_steps(made, range(1, 51))
    until(lambda: made.follower is not None and made.follower.failures >= 2)
    way.clear()
    until(lambda: caught_up(made))
    FAULTS[fault](way)
    save(made, 50, 1.0)
    log_steps(made, range(51, 101))
    until(lambda: made.follower is not None and made.follower.failures >= 2)
    way.clear()
    until(lambda: caught_up(made))
    FAULTS[fault](way)
    log_steps(made, range(101, 151))
    made.finish("KILLED", {}, resumable=True)
    assert said.text.count("MLflow did not get all of this run") == 1
    assert f"later: python -m mlmx sync run={folder}" in said.text
    assert made.follower is not None
    made.follower.thread.join()  # as with the process: an attempt under way would succeed now

    way.clear()
    assert main(["sync", f"run={folder}"]) == 0
    assert f"1 ending sent to {way.uri}" in capsys.readouterr().out
    assert_equal(server, made)
    [run] = runs_for(server, folder)
    assert run.data.tags["resumable"] == "true"
    assert len(run.inputs.dataset_inputs) == 2
    [weights] = models_of(server, made)["epoch-1"].glob("model/*.safetensors")
    assert weights.stat().st_size == 100_000
    assert main(["sync", f"run={folder}"]) == 0
    assert f"{way.uri} has all of it" in capsys.readouterr().out
    assert_equal(server, made)


def test_nobody_waits_for_a_server_that_is_slow(way: Way, server: Server, outputs: Path):
    """Answers are held back until the training is over: if any part of it waited, it would never be."""
    made = tracker(outputs / "train" / "run", way.uri)
    until(lambda: caught_up(made))
    way.open.clear()
    log_steps(made, range(1, 501))
    save(made, 500, 1.0)
    log_steps(made, range(501, 1001))
    assert made.follower is not None
    assert made.follower.failures == 0
    assert made.follower.mirror.sent_bytes < made.lines.size
    way.seconds = 0.1
    way.open.set()
    made.finish("FINISHED", {})
    assert_equal(server, made)


def test_a_server_that_was_away_all_the_time_gets_everything_by_sync(way: Way, server: Server, outputs: Path, capsys):
    way.hangs_up = True
    folder = outputs / "train" / "run"
    made = tracker(folder, way.uri)
    log_steps(made, range(1, 1001))
    save(made, 1000, 2.0)
    (made.run.plots).mkdir()
    (made.run.plots / "loss.png").write_bytes(b"\x89PNG")
    made.finish("FINISHED", {"total": 1.0})
    assert runs_for(server, folder) == []
    assert main(["sync", f"run={folder}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1

    way.clear()
    assert main(["sync", f"run={folder}"]) == 0
    assert "1 run, 2 params, 2 datasets, 3,000 points, 1 model, 6 files, 1 ending sent" in capsys.readouterr().out
    assert_equal(server, made)
    [run] = runs_for(server, folder)
    assert run.data.params == {"lr": "1e-05", "seed": "42"}
    assert "resumable" not in run.data.tags
    ended = made.run.read_json("mlflow.json")
    assert (run.info.start_time, run.info.end_time) == (ended["started"], ended["ended"])
    there = server.artifacts.glob(f"**/{run.info.run_id}/artifacts/**/*")
    [(name, model)] = models_of(server, made).items()
    assert name == "epoch-2"
    files = {path.name: path.read_bytes() for path in [*there, *model.glob("model/*")] if path.is_file()}
    own = {path.name: path.read_bytes() for path in folder.rglob("*") if path.name in files}
    assert files == own
    assert {"model.safetensors", "loss.png", "metrics.jsonl", "result.json"} <= set(files)
    assert not list(server.artifacts.glob("**/optimizer.safetensors"))

    assert main(["sync", f"run={folder}"]) == 0
    assert "has all of it" in capsys.readouterr().out
    assert_equal(server, made)
    assert len(runs_for(server, folder)) == 1


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="a process's limits are set from outside on Linux only")
def test_a_store_without_space_gets_everything_when_there_is_some(
    server: Server, outputs: Path, said: pytest.LogCaptureFixture
):
    import psutil

    made = tracker(outputs / "train" / "run", server.uri)
    until(lambda: caught_up(made))
    assert server.process is not None
    processes = [server.process.pid, *(child.pid for child in psutil.Process(server.process.pid).children(True))]
    before = resource.prlimit(processes[0], resource.RLIMIT_FSIZE)
    full = (server.database.stat().st_size, before[1])
    for process in processes:
        resource.prlimit(process, resource.RLIMIT_FSIZE, full)
    step = 0
    while made.follower is not None and made.follower.failures < 2:
        log_steps(made, range(step, step + 100))
        step += 100
        time.sleep(0.01)
    until(lambda: "MLflow cannot be reached" in said.text)
    for process in processes:
        resource.prlimit(process, resource.RLIMIT_FSIZE, before)
    log_steps(made, range(step, step + 10))
    made.finish("FINISHED", {})
    assert_equal(server, made)


def test_sending_again_doubles_nothing_on_a_real_server(server: Server, outputs: Path):
    """Not even where it is not known what is there: the store keeps equal points once."""
    from mlmx.tracking.mlflow_run import MlflowRun
    from mlmx.tracking.store import connect

    made = tracker(outputs / "train" / "run", server.uri)
    log_steps(made, range(1, 200))
    made.finish("FINISHED", {})
    store = stores.server(uri=server.uri)
    client, experiment = connect(store)
    record = record_of(made.run)
    assert record is not None
    ignorant = MlflowRun(client, experiment, record)
    ignorant.has = {}
    assert ignorant.log(made.run.metrics()) == 3 * 199
    assert_equal(server, made)
    assert sum(update(made.run, store).values()) == 0


def test_what_a_run_lets_go_of_goes_on_a_real_server_and_the_best_is_in_its_registry(
    way: Way, server: Server, outputs: Path, capsys: pytest.CaptureFixture[str]
):
    """Also while answers are lost; then a run that was sent late comes to the same."""
    from mlflow import MlflowClient

    folder = outputs / "train" / "run"
    made = tracker(folder, way.uri, registered="away", rotates=True)
    until(lambda: caught_up(made))
    for step, loss in enumerate((2.0, 1.0, 1.5, 1.7), start=1):
        made.log(step, float(step), {"heldout/loss": loss})
        for gone in {1, 3} & {step - 1}:  # keep=best+last
            shutil.rmtree(made.run.checkpoints / f"checkpoint-{gone}")
        way.loses_answers = step == 3
        made.checkpoint(checkpoint(made.run, step, float(step)), step, float(step))
        if step == 3:
            until(lambda: made.follower is not None and made.follower.failures >= 1)
            way.clear()
    made.finish("FINISHED", {})
    assert set(models_of(server, made)) == {"epoch-2", "epoch-4"}
    described = [path for path in server.artifacts.glob("**/MLmodel") if str(made.run_id) in path.read_text()]
    assert len(described) == 2, "the files of the others are gone"
    client = MlflowClient(server.uri)
    best, last = (client.get_model_version_by_alias("away", alias) for alias in ("best", "last"))
    assert (best.tags["mlmx.step"], last.tags["mlmx.step"]) == ("2", "4")
    assert_equal(server, made)
    assert main(["sync", f"run={folder}"]) == 0
    assert "has all of it" in capsys.readouterr().out
