"""A run's folder: where it lies, how it is found again, and that its files are whole or not there."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mlmx.config import compose, paths
from mlmx.config.errors import RequestError
from mlmx.config.paths import outputs_dir
from mlmx.config.schema import TrainConfig
from mlmx.runs import metrics_file
from mlmx.runs.log import log_to, log_to_file
from mlmx.runs.records import Result, Status
from mlmx.runs.run import Run, all_runs, begin_run, discard_empty, find_run

ROOT = Path(__file__).resolve().parents[2]

CONFIG = TrainConfig(
    chunk_size=128,
    lr=5e-5,
    note="it's a note: with ${signs} and 日本語",
    model={"name": "scratch", "layers": 1},
    dataset={"name": "files", "path": ["a.txt", "b.txt"], "train_chunks": 0.9},
    trainer={"name": "corrected", "warmup_steps": 10, "optim_args": None},
)


def made(folder: Path, status: str = "FINISHED", started: float | None = None, **result: Any) -> Run:
    """A run's folder as a training leaves it, its model being nothing but a config."""
    run = begin_run(folder, CONFIG, ("chunk_size=128",), {})
    run.write_json("result.json", {"status": status, **result})
    run.model.mkdir()
    (run.model / "config.json").write_text("{}")
    if started is not None:
        os.utime(folder / "overrides.yaml", (started, started))
    return run


# ------------------------------------------------------------------------------------ outputs_dir


def test_outputs_lie_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, folder in {"/a/b": "/a/b", "rel/x": tmp_path / "rel/x", "~/x": tmp_path / "home/x"}.items():
        monkeypatch.setenv("MLMX_OUTPUTS", given)
        assert outputs_dir() == Path(folder)


@pytest.mark.parametrize("unset", [None, ""])
def test_outputs_lie_in_the_checkout_whatever_the_working_folder(
    unset: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv("MLMX_OUTPUTS")
    if unset is not None:
        monkeypatch.setenv("MLMX_OUTPUTS", unset)
    monkeypatch.chdir(tmp_path)
    assert outputs_dir() == ROOT / "outputs"


def test_outputs_of_an_installed_package_lie_in_the_working_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("MLMX_OUTPUTS")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "CHECKOUT", None)
    assert outputs_dir() == tmp_path / "outputs"
    assert outputs_dir().is_absolute()


def test_a_moment_names_folders_in_the_order_of_time():
    moments = [compose._moment() for _ in range(3)]
    assert moments == sorted(moments)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.\d{3}", moments[0])


# ------------------------------------------------------------------------------------------ begin


def test_a_run_begins_with_its_config_overrides_and_status(outputs: Path):
    run = begin_run(outputs / "train" / "now", CONFIG, ("chunk_size=128", "note='it''s'"), {})
    made_of = ["config.yaml", "inputs.json", "overrides.yaml", "result.json"]
    assert sorted(path.name for path in run.folder.iterdir()) == made_of
    assert run.config() == CONFIG
    assert run.result() == Result(Status.RUNNING)


def test_a_folder_that_holds_a_run_is_refused_and_untouched(tmp_path: Path):
    run = made(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(RequestError, match=r"already holds a run; choose another hydra\.run\.dir"):
        begin_run(run.folder, TrainConfig(), (), {})
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_a_config_written_by_hand_is_checked_when_read(tmp_path: Path):
    run = begin_run(tmp_path / "run", CONFIG, (), {})
    path = run.folder / "config.yaml"
    path.write_text(path.read_text().replace("chunk_size: 128", "chunk_sze: 128"))
    with pytest.raises(RequestError, match=r"chunk_sze: unknown key; did you mean chunk_size\?"):
        run.config()


# ------------------------------------------------------------------------------------------- find


def test_a_run_is_found_by_folder_by_id_and_as_the_last(outputs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    old = made(outputs / "train" / "z-older", started=1_000, run_id="abc123")
    swept = made(outputs / "train" / "sweep" / "0", started=2_000, run_id="def456")
    made(outputs / "train" / "running", status="RUNNING", started=3_000, run_id="ghi789")
    elsewhere = made(tmp_path / "elsewhere")
    monkeypatch.chdir(outputs)
    assert all_runs()[:2] == [old, swept]
    assert find_run("last") == swept
    assert find_run("abc123") == old
    assert find_run("def456") == swept
    assert find_run(str(old.folder)) == find_run("train/z-older") == old
    assert find_run(str(elsewhere.folder)) == elsewhere
    assert find_run("train/z-older").folder.is_absolute()


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
def test_an_unfinished_run_is_refused_by_any_name_and_is_never_the_last(status: str, outputs: Path):
    run = made(outputs / "train" / "run", status=status, run_id="abc123")
    for wanted in (str(run.folder), "abc123"):
        with pytest.raises(RequestError, match=rf"run={re.escape(wanted)}: this run is unfinished \(status {status}\)"):
            find_run(wanted)
    with pytest.raises(RequestError, match="run=last: no finished run"):
        find_run("last")


def test_a_finished_run_without_its_model_is_refused(outputs: Path):
    run = made(outputs / "train" / "run")
    (run.model / "config.json").unlink()
    with pytest.raises(RequestError, match="unfinished"):
        find_run(str(run.folder))


@pytest.mark.parametrize("wanted", ["nope", "", "train", "/nowhere/at/all", "None", "null"])
def test_what_is_no_run_is_refused(wanted: str, outputs: Path, monkeypatch: pytest.MonkeyPatch):
    made(outputs / "train" / "run", run_id=None)
    monkeypatch.chdir(outputs)
    with pytest.raises(RequestError, match=f"run={wanted}: no such run"):
        find_run(wanted)


def test_without_runs_there_is_no_last(outputs: Path):
    assert all_runs() == []
    with pytest.raises(RequestError, match="train one first"):
        find_run("last")


# ---------------------------------------------------------------------------------- discard_empty


def test_an_empty_run_folder_goes_with_the_empty_folders_above_it(outputs: Path):
    folder = outputs / "train" / "sweep" / "0"
    folder.mkdir(parents=True)
    (folder.parent / "multirun.yaml").write_text("hydra: {}\n")
    discard_empty(folder)
    assert not outputs.exists()
    discard_empty(folder)  # once more does no harm


@pytest.mark.parametrize(
    "kept", ["train/sweep/0/train.log", "train/sweep/0/model/config.json", "train/sweep/1/x", "train/sweep/notes.txt"]
)
def test_no_folder_that_holds_something_is_discarded(kept: str, outputs: Path):
    (outputs / "train" / "sweep" / "0").mkdir(parents=True)
    (outputs / "train" / "sweep" / "multirun.yaml").write_text("hydra: {}\n")
    (outputs / kept).parent.mkdir(parents=True, exist_ok=True)
    (outputs / kept).write_text("mine")
    discard_empty(outputs / "train" / "sweep" / "0")
    assert (outputs / kept).read_text() == "mine"
    assert (outputs / "train" / "sweep" / "multirun.yaml").is_file()


def test_folders_outside_outputs_are_left_alone(tmp_path: Path, outputs: Path):
    outside = tmp_path / "outside" / "run"
    outside.mkdir(parents=True)
    discard_empty(outside)
    assert outside.is_dir()


# ------------------------------------------------------------------------------------------ files


def test_numbers_and_texts_come_back_as_they_were(tmp_path: Path):
    run = Run(tmp_path)
    value = {"status": "FINISHED", "metrics": {"eval/loss": 0.1 + 0.2, "n": 10**17}, "note": "naïve 日本語", "id": None}
    run.write_json("result.json", value)
    assert run.read_json("result.json") == value
    assert "日本語" in (tmp_path / "result.json").read_text(encoding="utf-8")
    assert run.read_json("data.json") == {}


def test_the_checkpoints_of_a_run_are_those_that_are_whole_and_were_asked_for(tmp_path: Path):
    run = Run(tmp_path)
    assert run.saved() == []
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "checkpoint-mine", "damaged-checkpoint-8"):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "manifest.json").write_text("{}")
        (run.checkpoints / name / "state.json").write_text(json.dumps({"interim": name == "checkpoint-11"}))
    (run.checkpoints / "checkpoint-12").mkdir()
    assert [folder.name for folder in run.saved()] == ["checkpoint-9", "checkpoint-10"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(tmp_path)
    run.write_json("result.json", {"status": "RUNNING"})
    with pytest.raises(TypeError):
        run.write_json("result.json", {"status": object()})
    assert run.read_json("result.json") == {"status": "RUNNING"}

    seen: list[dict[str, Any]] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda aside, to: (seen.append(run.read_json(to.name)), replace(aside, to))[1])
    run.write_json("result.json", {"status": "FINISHED"})
    assert seen == [{"status": "RUNNING"}]  # what a reader finds while the new file is written
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_metrics_come_back_oldest_first_with_step_epoch_and_time(tmp_path: Path):
    from datetime import datetime

    run = Run(tmp_path)
    assert run.metrics() == []
    run.append_metrics(0, 0.0, {"eval/loss": 10.5})
    run.append_metrics(7, 1 / 3, {"train/loss": 0.1 + 0.2, "train/grad_norm": 1.0})
    first, second = run.metrics()
    assert list(first) == ["step", "epoch", "time", "eval/loss"]
    assert (second["step"], second["epoch"], second["train/loss"]) == (7, 0.333333, 0.1 + 0.2)
    assert datetime.fromisoformat(first["time"]) <= datetime.fromisoformat(second["time"])
    assert datetime.fromisoformat(first["time"]).tzinfo is not None
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [first, second]


def test_the_log_of_a_run_stands_in_its_folder_and_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = logging.getLogger("mlmx")
    before = list(log.handlers)
    with log_to(), log_to_file(Run(tmp_path)):
        log.info("loss %g, naïve", 1.5)
    log.info("after the run")
    assert capsys.readouterr().out == "loss 1.5, naïve\n"
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d loss 1\.5, naïve\n", (tmp_path / "train.log").read_text(encoding="utf-8")
    )
    assert log.handlers == before


WHOLE = b'{"step": 1, "epoch": 0.5, "time": "2026-01-01T00:00:00+00:00", "train/loss": 2.0}\n'


@pytest.mark.parametrize(
    "torn", [b'{"step": 2, "epo', b"\0" * 4096, b"\0" * 40 + b"\n", b'{"step": 2}', b"2\n", b"[" * 5000 + b"\n", b""]
)
def test_what_a_kill_or_a_power_cut_leaves_behind_the_last_row_is_cut_off(torn: bytes, tmp_path: Path):
    run = Run(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(WHOLE + torn)
    assert [row["step"] for row in run.metrics()] == [1]
    run.append_metrics(2, 1.0, {"train/loss": 1.0})
    assert [row["step"] for row in run.metrics()] == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(WHOLE + b'{"step": 2')


def test_a_line_that_cannot_be_written_whole_is_not_there(tmp_path: Path):
    run, file = Run(tmp_path), metrics_file.MetricsFile(tmp_path)
    file.append(1, 0.5, {"train/loss": 2.0})

    class FillsUp:
        """Takes ten bytes of a line and no more."""

        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 10

        def write(self, line: memoryview) -> int:
            if not self.left:
                raise OSError(28, "No space left on device")
            taken, self.left = self.file.write(line[: self.left]), 0
            return int(taken)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    file.file, real = FillsUp(file.file), file.file  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        file.append(2, 1.0, {"train/loss": 1.0})
    file.file = real
    file.append(2, 1.0, {"train/loss": 1.0})
    file.close()
    assert [row["step"] for row in run.metrics()] == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_a_line_s_time_is_the_moment_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = metrics_file.MetricsFile(tmp_path)
    zone = datetime.now().astimezone().tzinfo
    for now in (1_790_000_000.0, 1_790_000_000.000_001, 1_790_000_000.999_999_8, 1_790_000_001.000_5):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        written = datetime.fromisoformat(file.append(1, 0.5, {"train/loss": 2.0})["time"])
        assert 0 <= now - written.timestamp() < 2e-6
        assert written.utcoffset() == zone.utcoffset(None)
    monkeypatch.undo()
    before = datetime.now(zone)
    written = datetime.fromisoformat(file.append(1, 0.5, {"train/loss": 2.0})["time"])
    file.close()
    assert before <= written <= datetime.now(zone)
