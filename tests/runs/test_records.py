"""A bad file is a bad run: whatever a record's file holds, it is read, and the other runs are none the worse."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from mlmx.commands import evaluate, resume
from mlmx.commands.main import main
from mlmx.comparison.ranking import tabulate
from mlmx.config.schema import EvaluateConfig
from mlmx.runs import process, provenance, records
from mlmx.runs.records import JobRecord, MlflowRecord, ProcessRecord, Result, SplitRecord, Status, SweepRecord
from mlmx.runs.run import all_runs
from mlmx.sweeps.sweep import Sweep, all_sweeps, mark_dead
from tests.support.made_runs import made

WHOLE: list[Any] = [
    Result(Status.KILLED, True, "an id", "a name", "mlmx train", "p", True, {"eval/loss": 2.5, "n": 7}, {"total": 1.5}),
    MlflowRecord("a name", {"a": "b"}, {"lr": "1"}, 5, 6, "an id", "best", ["checkpoint-1"], ["a note"]),
    ProcessRecord("host", "boot", "pid:[1]", 12, 3.5, "2026-01-01T00:00:00+00:00"),
    JobRecord("a key", "dials", ["lr=1"], "why it failed"),
    SweepRecord("a name", "mlmx train -m", "an id", {"lr": "1,2"}, 2, Status.KILLED, 5, 6, "/a/folder"),
]
TORN = [
    *(b"", b" ", b"null", b"5", b'"a"', b"[]", b"[1]", b"{", b'{"status": "RUNN', b"\x00" * 64, b"\xff\xfe"),
    *(b"9" * 5000, b"[" * 3000, b'{"status":' * 3000, b'{"a": 1} {"b": 2}'),
]  # fmt: skip
WRONG: list[Any] = [None, 5, -1, 10**400, 1e999, True, "", "x", "\ud800", [], [1], {}, {"a": [1]}, {"a": 10**400}]
WRONG.append(json.loads("[" * 500 + "]" * 500))


def as_folder(path: Path) -> None:
    path.mkdir()


def as_loop(path: Path) -> None:
    path.symlink_to(path)  # nobody can read it, root included


@pytest.mark.parametrize("record", WHOLE, ids=lambda record: record.FILE)
def test_a_record_comes_back_as_it_was(record: Any, tmp_path: Path):
    assert records.read(type(record), tmp_path) is None
    records.write(record, tmp_path)
    assert records.read(type(record), tmp_path) == record
    assert json.loads((tmp_path / record.FILE).read_text(encoding="utf-8")) == asdict(record)


@pytest.mark.parametrize("record", WHOLE, ids=lambda record: record.FILE)
@pytest.mark.parametrize("contents", [*TORN, as_folder, as_loop], ids=lambda one: repr(one)[:20])
def test_a_torn_record_says_nothing_and_that_it_is_torn(contents: Any, record: Any, tmp_path: Path):
    path, notes = tmp_path / record.FILE, list[str]()
    contents(path) if callable(contents) else path.write_bytes(contents)
    assert records.read(type(record), tmp_path, notes) == type(record)()
    assert notes == [f"{record.FILE} cannot be read"]


FIELDS = [(record, one.name) for record in WHOLE for one in fields(record)]


@pytest.mark.parametrize(("record", "name"), FIELDS, ids=[f"{record.FILE}-{name}" for record, name in FIELDS])
def test_a_field_of_another_type_counts_as_absent_and_takes_no_other_along(record: Any, name: str, tmp_path: Path):
    default = getattr(type(record)(), name)
    for value in WRONG:
        (tmp_path / record.FILE).write_text(json.dumps(asdict(record) | {name: value, "not_known": value}))
        found = records.read(type(record), tmp_path)
        assert replace(found, **{name: default}) == replace(record, **{name: default}), value
        kept = getattr(found, name)
        assert type(kept) in (type(default), type(getattr(record, name))), value
        assert not isinstance(kept, int) or 0 <= kept < 2**53, "what databases and clocks can hold"
        records.write(found, tmp_path)
        assert records.read(type(record), tmp_path) == found, value


def test_numbers_that_are_none_are_left_out_and_the_others_stay_what_they_are(tmp_path: Path):
    text = '{"metrics": {"a": 1, "b": 2.5, "c": Infinity, "d": "3", "e": true, "f": null, "g": [1], "h": 1e5}}'
    (tmp_path / "result.json").write_text(text.replace("null", "1" + "0" * 400))
    found = records.read(Result, tmp_path)
    assert found is not None
    assert str(found.metrics) == "{'a': 1, 'b': 2.5, 'c': inf, 'h': 100000.0}"


@pytest.mark.parametrize(
    "contents", [*TORN, b'{"eval": 5, "train": {"sha256": 5, "tokens": 7}}', b'{"heldout": {"protocol_parts": [1]}}']
)
def test_the_splits_of_a_data_report_are_read_as_far_as_they_go(contents: bytes, tmp_path: Path):
    (tmp_path / "data.json").write_bytes(contents)
    found = records.read_splits(tmp_path)
    assert set(found) <= {"train", "heldout"}
    assert all(split in (SplitRecord(tokens=7), SplitRecord()) for split in found.values())


@pytest.mark.parametrize("said", ["finished", "DONE", 5, None, [], {"a": 1}])
def test_a_status_that_is_none_is_unknown_and_unfinished(said: Any, outputs: Path):
    run = made(outputs / "train" / "a")
    run.write_json("result.json", {"status": said})
    assert run.status == Status.UNKNOWN == "UNKNOWN"
    assert tabulate([run]).rows[0].status == "UNKNOWN"
    assert resume.is_unfinished(run)
    assert process.mark_dead() == []


@pytest.mark.parametrize("lines", [b"", b"{}\n", b"[]\n{", b'{"step": 3, "epoch": 1.5}\n'])
def test_later_scores_are_kept_with_a_run_whose_numbers_are_damaged(lines: bytes, outputs: Path):
    run = made(outputs / "train" / "a", protocol="p")
    before = run.result()
    (run.folder / "metrics.jsonl").write_bytes(lines)
    config = replace(EvaluateConfig(), tracking={"name": "none"})
    evaluate.record(config, run, run.config().chunk_size, "p", {"heldout/loss": 2.0})
    row, step = run.metrics()[-1], 3 if b"step" in lines else 0
    assert (row["step"], row["evaluate/heldout/loss"]) == (step, 2.0)
    assert run.result() == replace(before, metrics=before.metrics | {"evaluate/heldout/loss": 2.0})


# ------------------------------------------------------------------------------------------- beside others

DAMAGES: list[bytes | Callable[[Path], None]] = [
    *(b"", b"{", b"[]", b"\xff\xfe", b"[" * 3000, b'{"status": 5, "run_id": [], "metrics": 7, "pid": {}, "tags": 1}'),
    *(b'{"status": "RUNNING", "pid": 1e99, "heldout": [], "eval": {"sha256": []}, "params": {"a": 1}}',),
    *(as_folder, as_loop),
]  # fmt: skip


@pytest.mark.parametrize("file", ["result.json", "process.json", "mlflow.json", "data.json", "inputs.json"])
def test_the_other_runs_are_treated_as_ever(file: str, outputs: Path, capsys: pytest.CaptureFixture[str]):
    names = {"best": 2.4, "second": 2.5, "bad": 2.6}
    for damage in DAMAGES:
        shutil.rmtree(outputs, ignore_errors=True)
        runs = {name: made(outputs / "train" / name, {"lr": loss}, loss=loss) for name, loss in names.items()}
        dead = made(outputs / "train" / "dead", {"seed": 9}, status="RUNNING")
        (dead.folder / ".lock").touch()
        records.write(replace(provenance.process(), pid=2**22 + 1), dead.folder)
        for order, run in enumerate([runs["bad"], *(runs[name] for name in ("best", "second")), dead]):
            (run.folder / "overrides.yaml").touch()
            os.utime(run.folder / "overrides.yaml", (order, order))
        (runs["bad"].folder / file).unlink(missing_ok=True)
        damage(runs["bad"].folder / file) if callable(damage) else (runs["bad"].folder / file).write_bytes(damage)

        table = tabulate([*runs.values(), dead])
        assert (len(table.rows), table.rows[0].name, table.best) == (4, "best", table.rows[0]), damage
        assert table.differences["second"].mean == pytest.approx(0.1), damage
        assert {run.folder.name for run in all_runs()} >= {"best", "second", "dead"}
        assert main(["doctor"]) == 0, damage
        assert f"killed   {dead.folder}: process {2**22 + 1} " in capsys.readouterr().out
        assert dead.status == Status.KILLED
        assert resume.unfinished("last", extend=False) == dead, damage


@pytest.mark.parametrize("file", ["result.json", "data.json", "inputs.json"])
def test_a_table_says_which_file_of_a_run_is_torn(file: str, tmp_path: Path):
    run = made(tmp_path / "a")
    (run.folder / file).write_bytes(b"{")
    rows = tabulate([run, made(tmp_path / "b")]).rows
    assert {row.name: row.note for row in rows} == {"a": f"{file} cannot be read", "b": ""}


def sweep_of(outputs: Path, name: str, status: Status = Status.RUNNING) -> Sweep:
    sweep = Sweep(outputs / "train" / name)
    for number in range(3):
        folder = made(sweep.folder / str(number), {"seed": number}, loss=2.4 + number / 10).folder
        records.write(JobRecord(f"key {number}", f"dials {number}", []), folder)
    records.write(SweepRecord(name, status=status, jobs=3, started=len(all_sweeps()) + 1), sweep.folder)
    records.write(replace(provenance.process(), pid=2**22 + 1), sweep.folder)
    return sweep


@pytest.mark.parametrize("damage", [one for one in DAMAGES if not callable(one)], ids=lambda one: repr(one)[:20])
def test_the_other_jobs_and_sweeps_are_treated_as_ever(damage: bytes, outputs: Path):
    bad, good = sweep_of(outputs, "bad"), sweep_of(outputs, "good")
    (bad.folder / "1" / "job.json").write_bytes(damage)
    (bad.folder / "2" / "result.json").write_bytes(damage)
    assert [job.about.key for job in bad.jobs() if job.folder.name != "1"] == ["key 0", "key 2"]
    assert [run.folder.name for run in bad.runs()] == ["0", "1", "2"]
    assert tabulate(bad.runs()).rows[0].run.folder.name == "0"
    (bad.folder / "sweep.json").write_bytes(damage)
    assert {sweep.folder.name for sweep in all_sweeps()} == {"bad", "good"}
    mark_dead()
    assert good.about().status == Status.KILLED
    assert bad.free_folder(bad.folder / "1").name == "3"
