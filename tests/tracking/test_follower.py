"""The follower: MLflow gets every point of metrics.jsonl once, whatever happens in between, and nobody waits for it."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlmx.runs.run import Run
from mlmx.tracking import follower
from mlmx.tracking.mirror import update
from mlmx.tracking.store import local, server
from mlmx.tracking.tracker import Tracker
from tests.support.made_runs import checkpoint
from tests.support.tracked import caught_up, history, logged, tracker, until

VALUES = (0.1 + 0.2, float("inf"), -1e-300, 7.0)


def log_steps(made: Tracker, steps: range) -> None:
    for step in steps:
        made.log(step, step / 100, {"train/loss": VALUES[step % len(VALUES)] + step, "train/grad_norm": step * 0.5})


def fails_after(deed: Callable[..., Any], times: int) -> Callable[..., Any]:
    """The deed is done, but its answer is lost, the first ``times`` times."""
    left = [times]

    def lost(*args: Any, **kwargs: Any) -> Any:
        found = deed(*args, **kwargs)
        if left[0]:
            left[0] -= 1
            raise ConnectionError("no answer")
        return found

    return lost


@pytest.mark.parametrize("deed", ["create_run", "log_batch", "log_inputs", "set_terminated", "search_runs"])
def test_what_arrived_without_an_answer_is_not_there_twice(deed: str, store: Path, outputs: Path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setattr(follower, "RETRY_AFTER_SECONDS", (0.01,))
    monkeypatch.setattr(MlflowClient, "create_run", fails_after(MlflowClient.create_run, deed == "search_runs"))
    monkeypatch.setattr(MlflowClient, deed, fails_after(getattr(MlflowClient, deed), 3))
    made = tracker(outputs / "run", local())
    log_steps(made, range(1, 4))
    made.log(4, 0.04, {"train/loss": float("nan")})
    made.finish("FINISHED", {})

    client = MlflowClient(local().uri)
    (run,) = client.search_runs([client.get_experiment_by_name("mlmx").experiment_id])
    assert run.info.run_id == made.run_id
    assert run.data.params == {"lr": "1e-05"}
    assert len(run.inputs.dataset_inputs) == 2
    assert repr(history(local(), made)) == repr(stored(logged(made)))


def test_how_a_run_ended_is_said_until_it_is_heard(store: Path, outputs: Path, monkeypatch):
    """A database may be busy more than twice; nothing comes after this one thing."""
    from mlflow import MlflowClient

    monkeypatch.setattr(follower, "RETRY_AFTER_SECONDS", (0.01,))
    end, left = MlflowClient.set_terminated, [3]

    def busy(*args: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("database is locked")
        end(*args)

    monkeypatch.setattr(MlflowClient, "set_terminated", busy)
    made = tracker(outputs / "run", local())
    log_steps(made, range(1, 4))
    made.finish("FAILED", {})
    assert history(local(), made) == stored(logged(made)), "its status is looked at there"


def test_mlflow_hears_of_an_end_that_no_file_can_be_told(store: Path, outputs: Path, monkeypatch):
    made = tracker(outputs / "run", local())
    log_steps(made, range(1, 4))
    until(lambda: caught_up(made))
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Tracker, "_write", lambda *args, **fields: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space"):
        made.finish("FAILED", {}, resumable=True)
    from mlflow import MlflowClient

    run = MlflowClient(local().uri).get_run(made.run.result().run_id)
    assert (run.info.status, run.data.tags["resumable"]) == ("FAILED", "true")


def stored(points: list[tuple[str, int, int, float]]) -> list[tuple[str, int, int, float]]:
    """As databases keep them, which have no infinity."""
    return [(*point, min(value, sys.float_info.max)) for *point, value in points]


def test_more_than_a_call_takes_arrives_in_order(store: Path, outputs: Path):
    made = tracker(outputs / "run", local())
    log_steps(made, range(700))
    made.finish("KILLED", {})
    assert history(local(), made) == stored(logged(made))
    assert len(logged(made)) == 2100


def test_files_come_after_the_numbers_before_them(store: Path, outputs: Path, monkeypatch):
    from mlmx.tracking.logged_models import Models
    from mlmx.tracking.mlflow_run import MlflowRun

    happened: list[tuple[str, int]] = []
    log, add, finish = MlflowRun.log, Models.add, MlflowRun.finish
    monkeypatch.setattr(
        MlflowRun,
        "log",
        lambda self, rows: (happened.extend(("step", row["step"]) for row in rows), log(self, rows))[1],
    )
    monkeypatch.setattr(Models, "add", lambda self, at, to: (happened.append(("saved", at.step)), add(self, at, to))[1])
    monkeypatch.setattr(MlflowRun, "finish", lambda self, *how: (happened.append(("end", 0)), finish(self, *how))[1])
    made = tracker(outputs / "run", local())
    for step in range(1, 31):
        log_steps(made, range(step, step + 1))
        if step % 10 == 0:
            made.checkpoint(checkpoint(made.run, step, step / 100), step, step / 100)
    made.finish("FINISHED", {})
    assert [number for what, number in happened if what == "step"] == list(range(1, 31))
    for step in (10, 20, 30):
        assert happened.index(("step", step)) < happened.index(("saved", step))
    assert happened[-1] == ("end", 0)


def test_a_checkpoint_that_is_refused_costs_a_line_now_and_at_the_end_and_nothing_else(
    store: Path, outputs: Path, said, monkeypatch
):
    from mlmx.tracking.logged_models import Models

    with monkeypatch.context() as refusing:
        refusing.setattr(Models, "add", lambda *_: 1 / 0)
        made = tracker(outputs / "run", local())
        made.checkpoint(checkpoint(made.run, 1, 1.0), 1, 1.0)
        log_steps(made, range(1, 3))
        until(lambda: caught_up(made))
        made.finish("FINISHED", {})
    refused = "MLflow did not take checkpoint-1 (ZeroDivisionError: division by zero); "
    assert said.text.count(f"{refused}it is tried again at the end of the run") == 1
    assert said.text.count(f"{refused}later: python -m mlmx sync run={made.run.folder}") == 1
    assert history(local(), made) == stored(logged(made))
    assert update(made.run, local())["models"] == 1


def noted(name: str, ask: Callable[..., Any], asked: list[str]) -> Callable[..., Any]:
    """The same, with its name written down when it is called."""

    def asking(*args: Any, **kwargs: Any) -> Any:
        asked.append(name)
        return ask(*args, **kwargs)

    return asking


def test_what_mlflow_has_is_not_brought_again_while_the_run_goes_on(store: Path, outputs: Path, monkeypatch):
    from mlflow import MlflowClient

    from mlmx.tracking import artifacts

    made = tracker(outputs / "run", local())
    made.checkpoint(checkpoint(made.run, 1, 1.0), 1, 1.0)
    until(lambda: caught_up(made))
    asked: list[str] = []
    with monkeypatch.context() as watched:
        for name in ("get_run", "log_batch", "log_inputs", "log_outputs", "search_logged_models", "set_tag"):
            watched.setattr(MlflowClient, name, noted(name, getattr(MlflowClient, name), asked))
        watched.setattr(artifacts, "place", lambda path, target: asked.append(path.name))
        assert made.follower is not None
        for step in (2, 3):
            log_steps(made, range(step, step + 1))
            made.follower.look()
            until(lambda: caught_up(made))
        assert asked == ["log_batch"] * 2
    made.finish("FINISHED", {})
    assert history(local(), made) == stored(logged(made))


def test_a_checkpoint_that_is_let_go_of_while_it_is_sent_is_not_missed(store: Path, outputs: Path, said, monkeypatch):
    from mlmx.tracking.logged_models import Models

    add = Models.add
    monkeypatch.setattr(Models, "add", lambda self, one, to: (shutil.rmtree(one.folder), add(self, one, to))[1])
    made = tracker(outputs / "run", local())
    made.checkpoint(checkpoint(made.run, 1, 1.0), 1, 1.0)
    made.finish("FINISHED", {})
    assert "MLflow" not in said.text
    assert history(local(), made) == stored(logged(made))


def test_nobody_waits_for_a_server_that_does_not_answer(outputs: Path, caplog, monkeypatch):
    """With a follower that is waited for, this test would take ten seconds a line."""
    monkeypatch.setattr(follower, "STALL_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        at = server(uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        made = tracker(outputs / "run", at)
        connection, _ = silent.accept()
        with connection:
            log_steps(made, range(1, 1001))
            assert made.follower is not None
            assert made.follower.mirror.sent_bytes == 0
            assert made.follower.failures == 0, "the first call has been answered; nothing was shown"
            made.finish("FINISHED", {})
    assert "MLflow did not get all of this run (no answer); missing there: 3,000 points" in caplog.text
    assert [row["step"] for row in made.run.metrics()] == list(range(1, 1001))
    assert made.run.read_json("result.json")["status"] == "FINISHED"


WRITES_UNTIL_KILLED = """
import itertools, sys
from pathlib import Path
from mlmx.runs.metrics_file import MetricsFile
file = MetricsFile(Path(sys.argv[1]))
for step in itertools.count():
    file.append(step, 0.0, {"train/loss": 0.5})
    print(step, flush=True)
"""


def test_a_killed_process_has_lost_no_line(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", WRITES_UNTIL_KILLED, tmp_path], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(200)]
        process.kill()
        said += process.stdout.readlines()
    whole = [line for line in said if line.endswith("\n")]
    assert len(whole) >= 200
    steps = [row["step"] for row in Run(tmp_path).metrics()]
    assert steps[: len(whole)] == [int(line) for line in whole]
    assert len(steps) - len(whole) in (0, 1)


def test_a_line_that_is_still_being_written_is_left_for_later(tmp_path: Path, store: Path, outputs: Path):
    made = tracker(outputs / "run", local())
    made.lines.file.write(b'{"step": 1, "epoch": 0.5, "time": "2026-01-01T00:00:00+00:00", "train/')
    made.checkpoint(outputs, 0, 0.0)  # makes the follower look
    until(lambda: made.follower is not None and made.run_id is not None and not made.follower.mirror.changed)
    made.lines.file.write(b'loss": 2.0}\n')
    made.finish("FINISHED", {})
    assert history(local(), made) == logged(made)
    assert len(logged(made)) == 2


def test_numbers_that_keep_coming_keep_no_checkpoint_waiting(store: Path, outputs: Path, monkeypatch):
    """Each call here takes as long as the training takes to log more."""
    from mlmx.tracking.mlflow_run import MlflowRun

    monkeypatch.setattr(follower, "SEND_EVERY_SECONDS", 0.01)
    made = tracker(outputs / "run", local())
    log, calls = MlflowRun.log, iter(range(50))

    def slow(self: MlflowRun, rows: Any) -> int:
        for step in calls:
            made.log(step + 10, 0.0, {"train/loss": 1.0})
            break
        return log(self, rows)

    monkeypatch.setattr(MlflowRun, "log", slow)
    log_steps(made, range(1, 2))
    made.checkpoint(checkpoint(made.run, 1, 1.0), 1, 1.0)
    until(lambda: any((outputs / "mlartifacts").glob("models/*/artifacts/model/config.json")))
    assert next(calls) < 40, "it waited until nothing more came"
    list(calls)  # the training is over
    made.finish("FINISHED", {})


def test_many_numbers_do_not_wait_for_their_second(store: Path, outputs: Path, monkeypatch):
    monkeypatch.setattr(follower, "SEND_EVERY_SECONDS", 1_000.0)
    made = tracker(outputs / "run", local())
    until(lambda: caught_up(made))
    log_steps(made, range(2 * follower.LINES_AT_ONCE))
    until(lambda: len(history(local(), made)) >= 3 * follower.LINES_AT_ONCE)
    made.finish("FINISHED", {})
    assert history(local(), made) == stored(logged(made))


def test_many_numbers_do_not_hurry_the_next_try(store: Path, outputs: Path, monkeypatch):
    from mlmx.tracking.mlflow_run import MlflowRun

    tried: list[int] = []

    def away(self: MlflowRun, rows: Any) -> int:
        tried.append(len(rows))
        raise ConnectionError("no answer")

    monkeypatch.setattr(follower, "RETRY_AFTER_SECONDS", (1_000.0,))
    monkeypatch.setattr(follower, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(MlflowRun, "log", away)
    made = tracker(outputs / "run", local())
    log_steps(made, range(1))
    until(lambda: made.follower is not None and made.follower.failures > 0)
    time.sleep(1)  # what woke the thread before is over
    before = len(tried)
    log_steps(made, range(1, 5 * follower.LINES_AT_ONCE))
    time.sleep(0.3)
    assert len(tried) == before
    made.finish("FINISHED", {})


def test_mlflow_never_knows_a_number_that_a_power_cut_could_take_from_the_file(store: Path, outputs: Path, monkeypatch):
    from mlmx.tracking.mlflow_run import MlflowRun

    on_disk, sent = [0], []
    log, fsync = MlflowRun.log, os.fsync
    made = tracker(outputs / "run", local())

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        if os.path.samestat(os.fstat(descriptor), made.lines.path.stat()):
            on_disk[0] = len(made.run.metrics())

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(MlflowRun, "log", lambda self, rows: (sent.append((on_disk[0], len(rows))), log(self, rows))[1])
    log_steps(made, range(1, 300))
    made.finish("FINISHED", {})
    assert sum(rows for _, rows in sent) == 299
    for number, (known, _) in enumerate(sent):
        assert known >= sum(rows for _, rows in sent[: number + 1])


def test_a_metric_that_mlflow_does_not_take_holds_up_nothing(store: Path, outputs: Path, said):
    made = tracker(outputs / "run", local())
    for step in range(1, 4):
        made.log(step, step / 100, {"train/loss": 1.0 / step, "eval/top@5": 0.5})
    made.finish("FINISHED", {})
    assert said.text.count("MLflow does not take the metric eval/top@5 (MlflowException") == 1
    assert history(local(), made) == [point for point in logged(made) if "@" not in point[0]]


def test_what_was_refused_is_tried_again_at_the_end(store: Path, outputs: Path, said, monkeypatch):
    from mlmx.tracking import artifacts

    made = tracker(outputs / "run", local())
    place, full = artifacts.place, [True]

    def placed(path: Path, target: Path) -> None:
        if full[0] and "models" in target.parts:
            raise OSError(28, "No space left on device")
        place(path, target)

    monkeypatch.setattr(artifacts, "place", placed)
    made.checkpoint(checkpoint(made.run, 1, 1.0), 1, 1.0)
    until(lambda: "did not take" in said.text)
    assert (
        "MLflow did not take checkpoint-1 (OSError: [Errno 28] No space left on device); it is tried again" in said.text
    )
    full[0] = False
    made.finish("FINISHED", {})
    kept = (outputs / "mlartifacts").glob("models/*/artifacts/model/*")
    assert sorted(path.name for path in kept) == ["config.json", "model.safetensors"]
    assert "did not get" not in said.text


@pytest.mark.long
def test_a_full_disk_under_the_store_costs_no_number(store: Path, outputs: Path, said, monkeypatch):
    """sqlite itself says that it is full: it may take no more pages until there is space again."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    monkeypatch.setattr(follower, "SEND_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(follower, "RETRY_AFTER_SECONDS", (0.01,))
    most_pages = [2**31]

    def limit(connection: Any, *_: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {most_pages[0]}")

    event.listen(Engine, "checkout", limit)
    try:
        made = tracker(outputs / "run", local())
        until(lambda: caught_up(made))
        most_pages[0] = 1  # as many as there are
        step = 0
        while made.follower is not None and made.follower.failures < 2:
            log_steps(made, range(step, step := step + 100))
        until(lambda: "database or disk is full" in said.text)
        most_pages[0] = 2**31
        log_steps(made, range(step, step + 10))
        made.finish("FINISHED", {})
    finally:
        event.remove(Engine, "checkout", limit)
    assert history(local(), made) == stored(logged(made))


def test_a_run_that_was_made_after_all_does_not_stay_beside_its_own(store: Path, outputs: Path, monkeypatch):
    """A server may answer a call long after nobody waits for the answer any more."""
    from mlflow import MlflowClient

    monkeypatch.setattr(follower, "RETRY_AFTER_SECONDS", (0.01,))
    create_run, late = MlflowClient.create_run, []

    def created(self: MlflowClient, *args: Any) -> Any:
        if not late:
            late.append(args)
            raise TimeoutError("no answer")
        return create_run(self, *args)

    monkeypatch.setattr(MlflowClient, "create_run", created)
    made = tracker(outputs / "run", local())
    until(lambda: made.run_id is not None)
    twin = create_run(MlflowClient(local().uri), *late[0])
    log_steps(made, range(1, 4))
    made.finish("FINISHED", {})
    client = MlflowClient(local().uri)
    [run] = client.search_runs([client.get_experiment_by_name("mlmx").experiment_id])
    assert run.info.run_id == made.run_id != twin.info.run_id
    assert history(local(), made) == stored(logged(made))


def test_an_mlflow_that_is_back_when_the_run_ends_is_asked_once_more(store: Path, outputs: Path, said, monkeypatch):
    """However short the patience: nothing is given up without an attempt to finish."""
    from mlflow import MlflowClient

    monkeypatch.setattr(follower, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(follower, "RETRY_AFTER_SECONDS", (0.01, 600.0))
    with monkeypatch.context() as away:
        away.setattr(MlflowClient, "log_batch", fails_always)
        made = tracker(outputs / "run", local())
        log_steps(made, range(1, 4))
        until(lambda: "MLflow cannot be reached" in said.text)
    made.finish("FINISHED", {})
    assert "did not get" not in said.text
    assert history(local(), made) == stored(logged(made))


def fails_always(*args: Any, **kwargs: Any) -> Any:
    raise ConnectionError("nobody is there")
