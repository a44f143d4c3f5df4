"""MLflow's store: made once and whole, whoever starts together; what is wrong with one is said in one line."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from mlmx.commands.main import main
from mlmx.runs.run import Run
from mlmx.tracking import follower, store
from mlmx.tracking.store import Store, is_of_a_network, local, make, newest_schema, trouble
from tests.support.tracked import caught_up, ended, history, logged, tracker, until

POINTS = 20


def job(outputs: str, number: int, all_there: Any) -> None:
    """What a job of a sweep does to the store: it opens it, logs, and ends."""
    os.environ["MLMX_OUTPUTS"] = outputs
    all_there.wait()
    made = tracker(Path(outputs) / "train" / str(number), local())
    for step in range(1, POINTS + 1):
        made.log(step, step / 10, {"train/loss": number + 1 / step, "train/grad_norm": float(step)})
    made.finish("FINISHED", {})


@pytest.mark.long
@pytest.mark.parametrize(
    ("processes", "rounds"), [(4, 2), pytest.param(16, 20, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)])]
)
def test_processes_that_start_together_on_a_fresh_store_lose_nothing(processes: int, rounds: int, tmp_path: Path):
    """Left to itself MLflow breaks: of 4 processes most fail, in each other's migrations."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlmx.tracking.mlflow_run", "tests.tracking.test_store"])
    for number in range(rounds):
        outputs = tmp_path / str(number)
        all_there = context.Barrier(processes)
        jobs = [context.Process(target=job, args=(str(outputs), n, all_there)) for n in range(processes)]
        for one in jobs:
            one.start()
        for one in jobs:
            one.join()
        assert [one.exitcode for one in jobs] == [0] * processes
        at = Store(f"sqlite:///{outputs / 'mlflow.db'}", "mlmx", outputs / "mlartifacts")
        for folder in (outputs / "train").iterdir():
            run = Run(folder)
            made: Any = SimpleNamespace(run=run, run_id=run.result().run_id, status="FINISHED")
            assert len(logged(made)) == 3 * POINTS
            assert history(at, made) == logged(made)


def test_a_store_is_made_before_the_jobs_that_share_it(outputs: Path):
    make(local())
    with sqlite3.connect(outputs / "mlflow.db") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert database.execute("SELECT name, artifact_location FROM experiments").fetchall() == [
            ("Default", f"{(outputs / 'mlartifacts').as_uri()}/0")
        ]
    database.close()
    made = (outputs / "mlflow.db").stat().st_ino
    make(local())
    assert (outputs / "mlflow.db").stat().st_ino == made
    assert sorted(path.name for path in outputs.iterdir()) == [".mlflow.lock", "mlartifacts", "mlflow.db"]
    make(store.server(uri="http://127.0.0.1:9"))  # its own affair


def test_a_network_disk_gets_no_write_ahead_log(outputs: Path, monkeypatch: pytest.MonkeyPatch):
    """Its other machines would not see the memory that the log is shared by."""
    monkeypatch.setattr(store, "is_of_a_network", lambda path: True)
    make(local())
    with sqlite3.connect(outputs / "mlflow.db") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    database.close()


def test_what_kind_of_disk_a_file_is_on_is_asked_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert not is_of_a_network(tmp_path)
    monkeypatch.setattr(store, "OF_A_NETWORK", ("",))
    assert is_of_a_network(tmp_path) == Path("/proc/self/mountinfo").is_file()


def is_made_by(outputs: str) -> None:
    os.environ["MLMX_OUTPUTS"] = outputs
    make(local())


@pytest.mark.long
def test_a_process_killed_while_it_makes_the_store_leaves_no_half_of_one(outputs: Path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlmx.tracking.mlflow_run", "tests.tracking.test_store"])
    process = context.Process(target=is_made_by, args=(str(outputs),))
    process.start()
    aside = outputs / ".mlflow.db.new"
    until(lambda: aside.is_file() and aside.stat().st_size > 300_000)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (outputs / "mlflow.db").exists()
    make(local())
    assert trouble(local()) is None
    assert not aside.exists()


# ------------------------------------------------------------------------------------------ bad stores


def older(store: Path, tables: bool) -> Path:
    """A store whose schema is that of an earlier version; MLflow migrates one unasked that lacks a table."""
    with sqlite3.connect(store) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        if not tables:
            database.execute("DROP TABLE input_tags")
    database.close()
    return store


def is_text(store: Path) -> None:
    store.write_text("this is no database, but a text of some length")


def is_folder(store: Path) -> None:
    store.unlink()
    store.mkdir()


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "older": (lambda store: older(store, tables=True), "mlflow db upgrade sqlite:///"),
    "much older": (lambda store: older(store, tables=False), "mlflow db upgrade sqlite:///"),
    "text": (is_text, "is no MLflow store (file is not a database); move it away"),
    "folder": (is_folder, "is a folder, not an MLflow store; move it away"),
}


@pytest.fixture(params=BAD)
def bad(request: pytest.FixtureRequest, store: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A store that cannot be used, and what is to be said of it."""
    monkeypatch.setattr(follower, "RETRY_AFTER_SECONDS", (0.01,))
    monkeypatch.setattr(follower, "PATIENCE_SECONDS", 0.2)
    spoil, words = BAD[request.param]
    spoil(store)
    return store, words


def contents(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def test_a_bad_store_is_said_in_one_line_and_left_alone(
    bad: tuple[Path, str], outputs: Path, said: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    store, words = bad
    before = contents(store)
    made = ended(outputs / "train" / "run")
    assert [record.getMessage() for record in said.records if words in record.getMessage()] != []
    assert "Traceback" not in said.text
    assert made.run.status == "FINISHED"
    assert len(made.run.metrics()) == 10

    capsys.readouterr()
    assert main(["sync", "run=last"]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert main(["ui"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert main(["doctor"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mlflow ")]
    assert words in line
    assert contents(store) == before


@pytest.fixture
def readable_by_all() -> Iterator[Path]:
    """A folder that every user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="mlmx-store-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_store_that_may_not_be_written_to(store: Path, readable_by_all: Path):
    path = Path(shutil.copy(store, readable_by_all / "mlflow.db"))
    path.chmod(0o444)
    readable_by_all.chmod(0o555)
    at = Store(f"sqlite:///{path}", "mlmx", readable_by_all / "mlartifacts")
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # whom file modes do not concern would notice nothing
    try:
        found = trouble(at)
    finally:
        if root:
            os.seteuid(0)
        readable_by_all.chmod(0o755)
    assert found is not None
    assert found.startswith(f"{path} cannot be written to (")
    assert found.endswith("make it and its folder writable, or set MLMX_OUTPUTS=<folder>")


def test_a_store_that_is_in_use_is_no_trouble(store: Path):
    with sqlite3.connect(store) as database:
        database.execute("BEGIN IMMEDIATE")
        assert trouble(local()) is None
    database.close()


class Refuses(BaseHTTPRequestHandler):
    """An address at which something answers that is no MLflow server in health."""

    def do_GET(self) -> None:
        self.send_error(503)

    def log_message(self, *_: object) -> None:
        pass


def test_an_address_that_does_not_answer_is_said(
    outputs: Path,
    said: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(follower, "RETRY_AFTER_SECONDS", (0.01,))
    monkeypatch.setattr(follower, "PATIENCE_SECONDS", 0.2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    words = f"{uri} does not answer ([Errno 111] Connection refused); start the server, or correct tracking.uri"
    made = tracker(outputs / "train" / "run", store.server(uri=uri))
    until(lambda: "MLflow cannot be reached" in said.text)
    made.finish("FINISHED", {})
    assert said.text.count(f"MLflow cannot be reached ({words})") == 1
    at = ["tracking=server", f"tracking.uri={uri}"]
    assert main(["sync", "run=last", *at]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert main(["ui", *at]) == 2
    assert words in capsys.readouterr().err
    assert main(["doctor", *at]) == 0
    assert words in capsys.readouterr().out


def test_an_address_that_answers_is_no_trouble_unless_it_says_so(monkeypatch: pytest.MonkeyPatch):
    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        at = store.server(uri=f"http://127.0.0.1:{server.server_address[1]}")
        assert trouble(at) == f"{at.uri} answers with 503 Service Unavailable; look after the server"
        monkeypatch.setattr(Refuses, "do_GET", lambda self: self.send_error(401))
        assert trouble(at) is None, "MLflow's client may know the password"
        server.shutdown()


def test_the_newest_schema_is_that_which_mlflow_makes(store: Path):
    with sqlite3.connect(store) as database:
        assert database.execute("SELECT version_num FROM alembic_version").fetchall() == [(newest_schema(),)]
    database.close()


def test_a_store_replaced_under_a_run_is_noticed(
    store: Path, outputs: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """sqlite itself goes on writing to the file that it has open, wherever that is now."""
    monkeypatch.setattr(follower, "RETRY_AFTER_SECONDS", (0.01,))
    monkeypatch.setattr(follower, "PATIENCE_SECONDS", 0.2)
    made = tracker(outputs / "train" / "run", local())
    made.log(1, 0.5, {"train/loss": 1.0})
    until(lambda: caught_up(made))
    put_back = Path(shutil.copy(store, outputs / "another.db"))
    store.unlink()
    put_back.rename(store)
    made.log(2, 1.0, {"train/loss": 0.5})
    made.finish("FINISHED", {})
    assert f"{store} was replaced by another file while this run wrote to it" in said.text
    assert f"later: python -m mlmx sync run={made.run.folder}" in said.text
