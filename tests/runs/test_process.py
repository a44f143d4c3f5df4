"""Who holds a run's folder, and which runs are dead: the truth whatever ended their processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlmx.config.errors import RequestError
from mlmx.config.schema import TrainConfig
from mlmx.runs import process, provenance
from mlmx.runs.process import held, is_alive, mark_dead
from mlmx.runs.records import Result, Status
from mlmx.runs.run import Run, all_runs, begin_run

HOLD = """
import sys, time
from pathlib import Path
from mlmx.runs.process import held
with held(Path(sys.argv[1])):
    (Path(sys.argv[1]) / "result.json").write_text('{"status": "RUNNING"}')
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(outputs: Path) -> Iterator[tuple[Run, subprocess.Popen[str]]]:
    """A run that another process holds."""
    run = Run(outputs / "train" / "held")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield run, process
    process.kill()
    process.wait()
    process.stdout.close()


def left(folder: Path, status: str = "RUNNING", **who: Any) -> Run:
    """A run as a process leaves it that said this of itself and is gone."""
    run = begin_run(folder, TrainConfig(), (), {})
    (folder / ".lock").touch()
    run.write_json("process.json", {**asdict(provenance.process()), "started": "2026-01-01T00:00:00+00:00", **who})
    run.write_json("result.json", {"status": status, "run_id": "abc"})
    return run


def heard(run: Run, seconds_ago: float) -> Run:
    then = time.time() - seconds_ago
    os.utime(run.folder / "process.json", (then, then))
    return run


# ------------------------------------------------------------------------------------------- held


def test_a_held_run_says_by_whom_and_lets_nobody_else_in(holder: tuple[Run, subprocess.Popen[str]]):
    run, process = holder
    who = run.read_json("process.json")
    assert who["pid"] == process.pid
    assert who["host"] == socket.gethostname()
    assert who["pid_started"] == provenance.pid_started(process.pid)
    before = {path: path.read_bytes() for path in run.folder.iterdir()}
    with pytest.raises(RequestError) as refused, held(run.folder):
        pass
    said = str(refused.value)
    assert f"in use by process {process.pid} on {who['host']} since {who['started']}" in said
    assert "\n" not in said
    assert {path: path.read_bytes() for path in run.folder.iterdir()} == before
    assert is_alive(run)
    assert mark_dead() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_holds_nothing(number: int, holder: tuple[Run, subprocess.Popen[str]]):
    run, process = holder
    os.kill(process.pid, number)
    process.wait()
    assert not is_alive(run)
    with held(run.folder):
        assert run.read_json("process.json")["pid"] == os.getpid()
        assert is_alive(run)
    assert not is_alive(run), "this process lives on, but the run is over"


def test_a_zombie_has_ended(holder: tuple[Run, subprocess.Popen[str]]):
    run, process = holder
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # gone, and not yet waited for
    assert Path(f"/proc/{process.pid}/stat").exists()
    assert provenance.pid_started(process.pid) is None
    assert not is_alive(run)


def test_children_that_outlive_a_process_do_not_hold_its_run(outputs: Path):
    """As the worker processes of a loader do for some seconds."""
    orphaning = HOLD.replace("    print", "    import os\n    if os.fork() == 0: time.sleep(8); os._exit(0)\n    print")
    run = Run(outputs / "train" / "held")
    process = subprocess.Popen([sys.executable, "-c", orphaning, str(run.folder)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        process.wait()
        assert not is_alive(run)
        with held(run.folder):
            pass


def test_the_heartbeat_is_the_time_of_the_file(outputs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process, "HEARTBEAT_SECONDS", 0.01)
    folder = outputs / "train" / "run"
    with held(folder):
        run = heard(Run(folder), seconds_ago=1000)
        while process.heard_seconds_ago(run) > 100:
            time.sleep(0.01)
    heard(run, seconds_ago=1000)
    time.sleep(0.1)
    assert process.heard_seconds_ago(run) > 900, "it ends with the run"


def test_a_refused_run_leaves_nothing(outputs: Path):
    folder = outputs / "train" / "run"
    with pytest.raises(RequestError, match="no"), held(folder):
        raise RequestError("no")
    assert not outputs.exists()


def test_a_refused_request_for_a_run_that_is_there_leaves_it_as_it_was(outputs: Path):
    for run in (left(outputs / "train" / "new", "FINISHED"), left(outputs / "train" / "old", "FINISHED")):
        if run.folder.name == "old":  # a copy without what is hidden or of the moment
            (run.folder / "process.json").unlink()
            (run.folder / ".lock").unlink()
        before = {path: path.read_bytes() for path in run.folder.iterdir()}
        with pytest.raises(RequestError, match="already holds a run"), held(run.folder):
            begin_run(run.folder, TrainConfig(), (), {})
        assert {path: path.read_bytes() for path in run.folder.iterdir()} == before


def test_a_run_that_has_begun_keeps_its_mark_whatever_ends_it(outputs: Path):
    folder = outputs / "train" / "run"
    with pytest.raises(RequestError, match="already holds a run"), held(folder):
        begin_run(folder / begin_run(folder, TrainConfig(), (), {}).folder, TrainConfig(), (), {})
    assert Run(folder).read_json("process.json")["pid"] == os.getpid()


# --------------------------------------------------------------------------------------- is_alive

ELSEWHERE = {"host": "elsewhere", "boot_id": "another"}


def test_a_recycled_pid_is_not_taken_for_the_process(outputs: Path):
    with held(outputs / "train" / "run"):
        run = Run(outputs / "train" / "run")
        who = run.read_json("process.json")
        assert is_alive(run)
        run.write_json("process.json", who | {"pid_started": who["pid_started"] - 5})
        assert not is_alive(run)


@pytest.mark.skipif(not psutil.LINUX, reason="elsewhere a process's start is kept as the time it was")
def test_a_process_stays_the_same_when_the_clock_is_set(outputs: Path, monkeypatch: pytest.MonkeyPatch):
    """Linux counts from the machine's start, whose own time then is another."""
    with held(outputs / "train" / "run"):
        before = psutil.boot_time()
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: before - 3600)
        assert psutil.Process().create_time() < time.time() - 3000, "it seems to have begun earlier"
        assert is_alive(Run(outputs / "train" / "run"))


@pytest.mark.parametrize("said", [{"pid_started": None}, {"pid": None}, {"pid": 10**30}, {"pid": -1}, {"pid": "x"}])
def test_a_process_that_cannot_be_looked_up_is_judged_by_its_lock(said: dict[str, Any], outputs: Path):
    with held(outputs / "train" / "run"):
        run = Run(outputs / "train" / "run")
        run.write_json("process.json", run.read_json("process.json") | said)
        assert is_alive(run)
    assert not is_alive(run)


def test_a_pid_of_another_namespace_is_not_looked_up_here(outputs: Path):
    """Two containers of one machine may share its name and its disk."""
    with held(outputs / "train" / "run"):
        run = Run(outputs / "train" / "run")
        run.write_json("process.json", run.read_json("process.json") | {"pid": 1, "pid_namespace": "pid:[1]"})
        assert is_alive(run), "the lock says so"
    assert not is_alive(run)


def test_what_was_not_heard_since_the_machine_started_anew_is_dead(outputs: Path, monkeypatch: pytest.MonkeyPatch):
    run = left(outputs / "train" / "run", boot_id="another")
    monkeypatch.setattr(provenance, "boot_time", lambda: time.time() - 100)
    assert not is_alive(heard(run, seconds_ago=110))
    assert is_alive(heard(run, seconds_ago=90)), "a machine of the same name"


@pytest.mark.parametrize(("seconds_ago", "lives"), [(0, True), (299, True), (301, False)])
def test_on_another_machine_the_heartbeat_decides(seconds_ago: float, lives: bool, outputs: Path):
    run = heard(left(outputs / "train" / "run", **ELSEWHERE), seconds_ago)
    assert is_alive(run) is lives
    run.write_json("result.json", {"status": "KILLED"})
    assert not is_alive(run), "it said itself that it ended"


@pytest.mark.parametrize(("seconds_ago", "lives"), [(10, True), (301, False)])
def test_a_run_that_names_no_process_lives_while_its_files_are_written(seconds_ago: float, lives: bool, outputs: Path):
    run = left(outputs / "train" / "run")
    (run.folder / "process.json").unlink()
    (run.folder / "metrics.jsonl").touch()
    old = time.time() - 10_000
    os.utime(run.folder / "result.json", (old, old))
    then = time.time() - seconds_ago
    os.utime(run.folder / "metrics.jsonl", (then, then))
    assert is_alive(run) is lives


# -------------------------------------------------------------------------------------- mark_dead


def test_the_dead_are_marked_killed_and_resumable_and_no_others(outputs: Path):
    dead = left(outputs / "train" / "sweep" / "0", pid=2**22 + 1)
    endings = {name: left(outputs / "train" / name, name) for name in ("FINISHED", "FAILED", "KILLED")}
    far = left(outputs / "train" / "far", **ELSEWHERE)
    with held(outputs / "train" / "mine"):
        mine = begin_run(outputs / "train" / "mine", TrainConfig(), (), {})
        assert mark_dead() == [dead]
        assert mark_dead() == []
    assert dead.result() == Result(Status.KILLED, resumable=True, run_id="abc")
    assert {name: run.status for name, run in endings.items()} == {name: name for name in endings}
    assert [far.status, mine.status] == ["RUNNING", "RUNNING"]


def test_a_torn_result_is_that_of_a_run_that_did_not_end(outputs: Path):
    run = left(outputs / "train" / "run")
    (run.folder / "result.json").write_text('{"status": "RUNN')
    assert mark_dead() == [run]
    assert run.result() == Result(Status.KILLED, resumable=True)


def test_a_run_that_was_killed_before_its_config_was_written_has_nothing_to_go_on_with(outputs: Path):
    run = left(outputs / "train" / "run")
    (run.folder / "config.yaml").unlink()
    assert mark_dead() == [run]
    assert run.read_json("result.json")["resumable"] is False


def test_a_run_that_is_resumed_meanwhile_is_not_marked(outputs: Path, monkeypatch: pytest.MonkeyPatch):
    run = left(outputs / "train" / "run")
    monkeypatch.setattr(process, "is_alive", lambda run: False)  # it was dead when it was looked at
    with held(run.folder):
        assert mark_dead() == []
    assert run.status == "RUNNING"


def test_runs_are_found_without_walking_through_their_files(outputs: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a", "sweep/0", "sweep/1"):
        run = left(outputs / "train" / name, "FINISHED")
        (run.checkpoints / "checkpoint-1").mkdir(parents=True)
    looked_at: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked_at.append(Path(path).name) or scandir(path))
    assert len(all_runs()) == 3
    assert sorted(looked_at) == ["0", "1", "a", "sweep", "train"]
    read: list[str] = []
    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **how: read.append(path.name) or read_text(path, **how))
    assert mark_dead() == []
    assert read == ["result.json"] * 3


# ------------------------------------------------------------------------------------ in commands


def small(tiny: Path, corpus: Path, *more: str) -> list[str]:
    sizes = ["dataset.train_chunks=8", "dataset.eval_chunks=4", "chunk_size=16", "epochs=1", "heldout.documents=4"]
    return ["train", f"model.path={tiny}", "dataset=files", f"dataset.path={corpus}", *sizes, *more]


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_at_it(
    tiny: Path, corpus: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
):
    from mlmx.commands.main import main

    folder = outputs / "train" / "run"
    with held(folder):
        run = begin_run(folder, TrainConfig(), (), {})
        before = {path: path.read_bytes() for path in folder.iterdir()}
        for asked in (small(tiny, corpus, f"hydra.run.dir={folder}"), ["train", f"resume={folder}"]):
            assert main(asked) == 2
            error = capsys.readouterr().err
            assert f"in use by process {os.getpid()} on {socket.gethostname()} since" in error
            assert error.count("\n") == 1
        assert main(["train", "resume=last"]) == 2
        assert "no unfinished run" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert run.status == "RUNNING"


def test_a_start_marks_the_dead_here_and_in_mlflow(
    tiny: Path, corpus: Path, outputs: Path, store: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlflow import MlflowClient

    from mlmx.commands.main import main
    from mlmx.tracking.tracker import Tracker

    finish = Tracker.finish
    monkeypatch.setattr(Tracker, "finish", lambda tracker, *args, **kwargs: tracker.follower.look())
    killed = small(tiny, corpus, f"hydra.run.dir={outputs / 'train' / 'killed'}")
    assert main(killed) == 0  # its process lives on, but nobody said how it ended
    run = Run(outputs / "train" / "killed")
    while not (run_id := run.read_json("result.json").get("run_id")):
        time.sleep(0.01)
    monkeypatch.setattr(Tracker, "finish", finish)
    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    assert client.get_run(run_id).info.status == run.status == "RUNNING"

    assert main(small(tiny, corpus)) == 0
    after = client.get_run(run_id)
    assert (run.status, after.info.status, after.data.tags["resumable"]) == ("KILLED", "KILLED", "true")
    tags = {name: value for name, value in after.data.tags.items() if name in provenance.PROCESS_TAGS}
    assert tags == provenance.process_tags()
    assert [run.status for run in all_runs()] == ["KILLED", "FINISHED"]
