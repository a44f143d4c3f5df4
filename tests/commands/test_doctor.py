"""``doctor`` tells the truth about every run, makes it known, and clears up after the dead only."""

from __future__ import annotations

import os
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mlmx.commands.main import main
from mlmx.config.schema import TrainConfig
from mlmx.runs import process, provenance
from mlmx.runs.run import Run, begin_run
from mlmx.tracking.store import local

HERE = asdict(provenance.process())
GONE = {"pid": 2**22 + 1, "pid_started": 1}


def left(folder: Path, status: str = "RUNNING", run_id: str | None = None, **who: Any) -> Run:
    """A run of this machine as a process leaves it that is gone."""
    run = begin_run(folder, TrainConfig(tracking={"name": "local"}), (), {})
    (folder / ".lock").touch()
    run.write_json("process.json", {**HERE, "started": "2026-01-01T00:00:00+00:00", **GONE, **who})
    run.write_json("result.json", {"status": status, "run_id": run_id})
    return run


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What ``doctor`` says, which always ends well."""
    assert main(["doctor"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out.splitlines()


def test_without_runs_there_is_nothing_to_say_and_nothing_is_made(outputs: Path, capsys: pytest.CaptureFixture[str]):
    assert lines(capsys) == [f"runs     none below {outputs / 'train'}"]
    assert not outputs.exists()


def test_each_run_that_has_not_finished_gets_its_line(outputs: Path, capsys: pytest.CaptureFixture[str]):
    left(outputs / "train" / "done", "FINISHED")
    dead = left(outputs / "train" / "dead")
    for step, sealed in ((9, True), (10, True), (11, False)):
        (dead.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        if sealed:
            (dead.checkpoints / f"checkpoint-{step}" / "manifest.json").write_text("{}")
    (dead.checkpoints / "checkpoint-mine").mkdir()
    (dead.checkpoints / "checkpoint-mine" / "manifest.json").write_text("{}")
    failed = left(outputs / "train" / "fai led", "FAILED")
    unborn = left(outputs / "train" / "unborn")
    (unborn.folder / "config.yaml").unlink()
    with process.held(outputs / "train" / "living"):
        living = begin_run(outputs / "train" / "living", TrainConfig(), (), {})
        said = [re.sub(r"heard \d+ s", "heard N s", line) for line in lines(capsys)]
    began = living.read_json("process.json")["started"]
    resume = "python -m mlmx train resume="
    gone = f"process {GONE['pid']} on {HERE['host']} is gone, marked KILLED"
    assert said == [
        f"runs     1 failed, 1 finished, 2 killed, 1 running below {outputs / 'train'}",
        f"killed   {dead.folder}: {gone}; go on from checkpoint-10: {resume}{dead.folder}",
        f"failed   {failed.folder}: go on from its start, for it has no checkpoint: {resume}'{failed.folder}'",
        f"killed   {unborn.folder}: {gone}; it had not begun; nothing is lost with its folder",
        f"running  {living.folder}: process {os.getpid()} on {HERE['host']} is at it since {began}, last heard N s ago",
    ]
    assert (dead.status, failed.status, living.status) == ("KILLED", "FAILED", "RUNNING")
    # The second time there is nothing to mark.
    assert f"killed   {dead.folder}: go on from checkpoint-10: {resume}{dead.folder}" in lines(capsys)


LEFTOVERS = ("checkpoints/.checkpoint-3.tmp/model.safetensors", ".model.a1.tmp/new/x", ".result.json.7.tmp", ".reserve")
KEPT = ("checkpoints/checkpoint-2/manifest.json", "checkpoints/damaged-checkpoint-1/x", "train.log", ".lock", "a.tmp")


def filled(run: Run) -> Run:
    for name in (*LEFTOVERS, *KEPT):
        (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run.folder / name).touch()
    return run


def there(run: Run, names: tuple[str, ...]) -> set[str]:
    return {name for name in names if (run.folder / name).exists()}


def test_what_the_dead_left_half_written_goes_and_nothing_else(outputs: Path, capsys: pytest.CaptureFixture[str]):
    dead, failed = filled(left(outputs / "train" / "dead")), filled(left(outputs / "train" / "failed", "FAILED"))
    far = filled(left(outputs / "train" / "far", host="elsewhere", boot_id="another"))
    with process.held(outputs / "train" / "living"):
        living = filled(begin_run(outputs / "train" / "living", TrainConfig(), (), {}))
        said = lines(capsys)
    for run, leftovers in {dead: set(), failed: set(), far: set(LEFTOVERS), living: set(LEFTOVERS)}.items():
        assert there(run, LEFTOVERS) == leftovers
        assert there(run, KEPT) == set(KEPT)
    removed = [line for line in said if line.startswith("removed")]
    assert len(removed) == 2 * len(LEFTOVERS)
    assert f"removed  {dead.checkpoints / '.checkpoint-3.tmp'}" in removed


def test_tokens_that_nobody_is_writing_any_more_go(outputs: Path, capsys: pytest.CaptureFixture[str]):
    old, new, whole = (outputs / "cache" / name for name in (".tokens-a.old.tmp", ".tokens-a.new.tmp", "tokens-a"))
    for folder in (old, new, whole):
        (folder / "new").mkdir(parents=True)
        (folder / "new" / "ids.npy").touch()
        for path in (folder / "new" / "ids.npy", folder / "new", folder):
            os.utime(path, (time.time() - 400,) * 2)
    (new / "new" / "offsets.npy").touch()
    assert f"removed  {old}" in lines(capsys)
    assert sorted(path.name for path in (outputs / "cache").iterdir()) == [".tokens-a.new.tmp", "tokens-a"]


# --------------------------------------------------------------------------------------------- MLflow


@pytest.fixture
def client(store: Path) -> Any:
    from mlflow import MlflowClient

    from mlmx.tracking.store import connect

    connect(local())
    return MlflowClient(local().uri)


def recorded(client: Any, folder: Path, status: str = "RUNNING", **who: Any) -> str:
    """An MLflow run of mlmx, as its process made and left it; returns its id."""
    tags = {"mlmx.folder": str(folder)}
    tags |= {f"mlmx.{name}": str(value) for name, value in (HERE | who).items() if value is not None}
    run = client.create_run(client.get_experiment_by_name("mlmx").experiment_id, tags=tags)
    if status != "RUNNING":
        client.set_terminated(run.info.run_id, status)
    return str(run.info.run_id)


def told(run: Run, client: Any, run_id: str) -> Run:
    """The run has this id, as its files say."""
    made = client.get_run(run_id)
    run.write_json("result.json", run.read_json("result.json") | {"run_id": run_id})
    about = {"name": made.info.run_name, "tags": made.data.tags, "params": {}}
    run.write_json("mlflow.json", about | {"started": made.info.start_time, "ended": None, "run_id": run_id})
    run.write_json("data.json", {})
    return run


def test_mlflow_says_how_runs_ended_that_could_not_tell_it(
    client: Any, outputs: Path, capsys: pytest.CaptureFixture[str]
):
    runs = {status: left(outputs / "train" / status, status) for status in ("RUNNING", "FAILED", "FINISHED")}
    ids = {status: recorded(client, run.folder, **GONE) for status, run in runs.items()}
    for status, run in runs.items():
        told(run, client, ids[status])
    with process.held(outputs / "train" / "living"):
        living = left(outputs / "train" / "living", **HERE)
        ids["living"] = recorded(client, living.folder)
        told(living, client, ids["living"])
        said = lines(capsys)
        found = {name: client.get_run(run_id).info.status for name, run_id in ids.items()}
        assert found == {"RUNNING": "KILLED", "FAILED": "FAILED", "FINISHED": "FINISHED", "living": "RUNNING"}
        assert f"mlflow   run {ids['RUNNING']} of {runs['RUNNING'].folder} said RUNNING, is KILLED now" in said
        assert [line for line in lines(capsys) if line.startswith("mlflow")] == []


def test_mlflow_runs_without_a_folder_are_closed_if_their_process_is_gone(
    client: Any, outputs: Path, capsys: pytest.CaptureFixture[str]
):
    nowhere = outputs / "train" / "nowhere"
    dead = {
        "gone": recorded(client, nowhere, **GONE),
        "recycled": recorded(client, nowhere, pid_started=1),
        "before the last start": recorded(client, nowhere, boot_id="another"),
    }
    unknown = {
        "living": recorded(client, nowhere),
        "elsewhere": recorded(client, nowhere, host="elsewhere", boot_id="another"),
        "another container": recorded(client, nowhere, pid_namespace="pid:[1]", **GONE),
        "of an older version": recorded(client, nowhere, boot_id=None, pid=None, pid_started=None),
    }
    other = client.create_run(client.get_experiment_by_name("mlmx").experiment_id, tags={}).info.run_id
    said = lines(capsys)
    assert {name: client.get_run(run_id).info.status for name, run_id in dead.items()} == dict.fromkeys(dead, "KILLED")
    assert {client.get_run(run_id).info.status for run_id in [*unknown.values(), other]} == {"RUNNING"}
    assert len([line for line in said if line.startswith("mlflow")]) == len(dead)


def test_a_folder_that_another_run_has_taken_says_nothing_of_the_first(
    client: Any, outputs: Path, capsys: pytest.CaptureFixture[str]
):
    first = recorded(client, outputs / "train" / "run", **GONE)
    left(outputs / "train" / "run", "FINISHED", run_id="another")
    lines(capsys)
    assert client.get_run(first).info.status == "KILLED"


def test_an_older_run_without_a_folder_is_closed_once_the_machine_has_started_anew(
    client: Any, outputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    old = recorded(client, outputs / "train" / "nowhere", boot_id=None, pid=None, pid_started=None)
    monkeypatch.setattr(provenance, "boot_time", lambda: time.time() + 10)
    lines(capsys)
    assert client.get_run(old).info.status == "KILLED"


def test_a_store_that_is_away_costs_a_line(outputs: Path, capsys: pytest.CaptureFixture[str]):
    dead = left(outputs / "train" / "dead")
    (outputs / "mlflow.db").write_text("this is no database")
    assert main(["doctor"]) == 0
    assert f"mlflow   {local().uri} cannot be looked at" in capsys.readouterr().out
    assert dead.status == "KILLED"
