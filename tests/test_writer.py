"""The writer: MLflow gets every point of metrics.jsonl once, whatever happens in between, and nobody waits for it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlmx import tracking
from mlmx.runs import Run
from mlmx.tracking import writer
from tests.test_tracking import history, logged, tracker, until

VALUES = (0.1 + 0.2, float("inf"), -1e-300, 7.0)


def log_steps(made: tracking.Tracker, steps: range) -> None:
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

    monkeypatch.setattr(writer, "RETRY_AFTER_SECONDS", (0.01,))
    monkeypatch.setattr(MlflowClient, "create_run", fails_after(MlflowClient.create_run, deed == "search_runs"))
    monkeypatch.setattr(MlflowClient, deed, fails_after(getattr(MlflowClient, deed), 3))
    made = tracker(outputs / "run", tracking.local())
    log_steps(made, range(1, 4))
    made.log(4, 0.04, {"train/loss": float("nan")})
    made.finish("FINISHED", {})

    client = MlflowClient(tracking.local().uri)
    (run,) = client.search_runs([client.get_experiment_by_name("mlmx").experiment_id])
    assert run.info.run_id == made.run_id
    assert run.data.params == {"lr": "1e-05"}
    assert len(run.inputs.dataset_inputs) == 2
    assert repr(history(tracking.local(), made)) == repr(stored(logged(made)))


def stored(points: list[tuple[str, int, int, float]]) -> list[tuple[str, int, int, float]]:
    """As databases keep them, which have no infinity."""
    return [(*point, min(value, sys.float_info.max)) for *point, value in points]


def test_more_than_a_call_takes_arrives_in_order(store: Path, outputs: Path):
    made = tracker(outputs / "run", tracking.local())
    log_steps(made, range(700))
    made.finish("KILLED", {})
    assert history(tracking.local(), made) == stored(logged(made))
    assert len(logged(made)) == 2100


def test_files_come_after_the_numbers_before_them(store: Path, outputs: Path, monkeypatch):
    from mlmx.tracking.mlflow_run import MlflowRun

    happened: list[tuple[str, int]] = []
    log, add_model, finish = MlflowRun.log, MlflowRun.add_model, MlflowRun.finish
    monkeypatch.setattr(
        MlflowRun,
        "log",
        lambda self, rows: (happened.extend(("step", row["step"]) for row in rows), log(self, rows))[1],
    )
    monkeypatch.setattr(
        MlflowRun,
        "add_model",
        lambda self, at, to: (happened.append(("saved", int(at.name))), add_model(self, at, to))[1],
    )
    monkeypatch.setattr(MlflowRun, "finish", lambda self, *how: (happened.append(("end", 0)), finish(self, *how))[1])
    made = tracker(outputs / "run", tracking.local())
    for step in range(1, 31):
        log_steps(made, range(step, step + 1))
        if step % 10 == 0:
            (folder := outputs / str(step)).mkdir()
            made.checkpoint(folder, step, step / 100)
    made.finish("FINISHED", {})
    assert [number for what, number in happened if what == "step"] == list(range(1, 31))
    for step in (10, 20, 30):
        assert happened.index(("step", step)) < happened.index(("saved", step))
    assert happened[-1] == ("end", 0)


def test_a_checkpoint_that_is_refused_costs_a_line_and_nothing_else(store: Path, outputs: Path, caplog):
    made = tracker(outputs / "run", tracking.local())
    made.checkpoint(outputs / "run" / "deleted-meanwhile", 1, 1.0)
    log_steps(made, range(1, 3))
    made.finish("FINISHED", {})
    assert caplog.text.count("MLflow did not take deleted-meanwhile (FileNotFoundError") == 1
    assert history(tracking.local(), made) == stored(logged(made))


def test_nobody_waits_for_a_server_that_does_not_answer(outputs: Path, caplog, monkeypatch):
    """With a writer that is waited for, this test would take ten seconds a line."""
    monkeypatch.setattr(writer, "STALL_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        at = tracking.server(uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        made = tracker(outputs / "run", at)
        connection, _ = silent.accept()
        with connection:
            log_steps(made, range(1, 1001))
            assert made.writer is not None
            assert made.writer.sent_bytes == 0
            assert made.writer.failures == 0, "the first call has been answered; nothing was shown"
            made.finish("FINISHED", {})
    assert "MLflow did not get all of this run (no answer); missing there: 3,000 points" in caplog.text
    assert [row["step"] for row in made.run.metrics()] == list(range(1, 1001))
    assert made.run.read_json("result.json")["status"] == "FINISHED"


WRITES_UNTIL_KILLED = """
import itertools, sys
from pathlib import Path
from mlmx.runs import MetricsFile
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
    steps = [row["step"] for row in Run(tmp_path).metrics()]
    assert steps[: len(whole)] == [int(line) for line in whole]
    assert len(steps) - len(whole) in (0, 1)


def test_a_line_that_is_still_being_written_is_left_for_later(tmp_path: Path, store: Path, outputs: Path):
    made = tracker(outputs / "run", tracking.local())
    made.lines.file.write(b'{"step": 1, "epoch": 0.5, "time": "2026-01-01T00:00:00+00:00", "train/')
    made.checkpoint(outputs, 0, 0.0)  # makes the writer look
    until(lambda: made.writer is not None and not made.writer.deeds)
    made.lines.file.write(b'loss": 2.0}\n')
    made.finish("FINISHED", {})
    assert history(tracking.local(), made) == logged(made)
    assert len(logged(made)) == 2


# ------------------------------------------------------------------------------------- a real server


@contextlib.contextmanager
def serving(port: int, folder: Path) -> Iterator[None]:
    """`mlflow server` on loopback from when it answers; killed, with all its processes, at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
    with (folder / "server.log").open("a") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=folder, start_new_session=True)
    try:
        until(lambda: process.poll() is not None or answers(port))
        assert process.poll() is None, (folder / "server.log").read_text()
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_server_killed_and_started_again_has_every_point_once(store: Path, outputs: Path, caplog, monkeypatch):
    monkeypatch.setattr(writer, "SEND_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(writer, "RETRY_AFTER_SECONDS", (0.1,))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    at = tracking.server(uri=f"http://127.0.0.1:{port}")
    saved = outputs / "checkpoint-2"
    saved.mkdir()
    (saved / "model.safetensors").write_bytes(b"weights")
    with serving(port, outputs):
        made = tracker(outputs / "run", at)
        log_steps(made, range(1, 20))
        until(lambda: made.writer is not None and made.writer.sent_bytes > 0)
        log_steps(made, range(20, 40))
    made.checkpoint(saved, 40, 2.0)
    log_steps(made, range(40, 60))
    until(lambda: "MLflow cannot be reached" in caplog.text)
    with serving(port, outputs):
        log_steps(made, range(60, 80))
        until(lambda: made.writer is not None and made.writer.failures == 0)
        made.finish("FINISHED", {})
        assert caplog.text.count("MLflow cannot be reached") == 1
        assert "did not get" not in caplog.text
        assert history(at, made) == stored(logged(made))
        (weights,) = (outputs / "artifacts").glob("**/checkpoints/epoch-2/model.safetensors")
        assert weights.read_bytes() == b"weights"
