"""Disk space: what a run will take is asked for before it begins, and a full disk ends in one line."""

from __future__ import annotations

import errno
import math
import os
import sqlite3
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from mlmx.commands.main import main
from mlmx.config.errors import RequestError
from mlmx.runs import disk
from mlmx.runs.explain import explain
from mlmx.training.arguments import optimizer_bytes, saves, training_arguments

MB = 2**20
Usage = namedtuple("Usage", "total used free")


# --------------------------------------------------------------------------------------- the estimate


@pytest.mark.parametrize(("saves", "limit"), [(0, 1), (1, None), (3, None), (3, 1), (10, 2)])
def test_the_estimate_covers_every_moment_of_a_run(saves: int, limit: int | None):
    """Saved by saved: the new checkpoint is whole before the oldest goes, whose weights MLflow lets go of later."""
    weights, optimizer = 10 * MB, 20 * MB
    kept = min(saves, limit or saves)
    most = there = 0
    for saved in range(1, saves + 1):
        deleted = saved - 1 > (limit or saves)
        most = max(most, (there + 1) * (weights + optimizer) + deleted * weights)
        there = min(there + 1, limit or saves)
    assert there == kept
    most = max(most, there * (weights + optimizer) + weights)
    needed = disk.needed_bytes(weights, optimizer, kept) - disk.OTHER_BYTES
    assert needed >= most
    assert needed <= most + 1 * (weights + optimizer) + weights, "and not much more: a checkpoint that a signal saves"


def arguments(**options: Any) -> Any:
    dials: dict[str, Any] = {"lr": 1e-4, "batch_size": 4, "weight_decay": 0.0, "seed": 0, "precision": "fp32"}
    epochs = options.pop("epochs", 3)
    options = {"name": "corrected", "use_cpu": True, "save_strategy": "epoch", **options}
    return training_arguments(options, Path("checkpoints"), epochs=epochs, **dials)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, (3, 3)),
        ({"save_strategy": "no"}, (0, 0)),
        ({"epochs": 2.5}, (3, 3)),
        ({"epochs": 0.1}, (1, 1)),
        ({"save_total_limit": 2}, (3, 2)),
        ({"save_total_limit": 5}, (3, 3)),
        ({"save_strategy": "steps", "save_steps": 10}, (8, 8)),  # 25 steps an epoch, 75 in all; the last one too
        ({"save_strategy": "steps", "save_steps": 500}, (1, 1)),
        ({"save_strategy": "steps", "save_steps": 0.1}, (10, 10)),  # a share of all steps
        ({"save_strategy": "steps", "save_steps": 10, "max_steps": 30}, (3, 3)),
        ({"max_steps": 30}, (2, 2)),
        ({"save_strategy": "steps", "save_steps": 10, "gradient_accumulation_steps": 4}, (3, 3)),  # 7 steps an epoch
        ({"dataloader_drop_last": True, "epochs": 1, "save_strategy": "steps", "save_steps": 1}, (24, 24)),
        (
            {
                "save_strategy": "best",
                "eval_strategy": "epoch",
                "metric_for_best_model": "eval_loss",
                "save_total_limit": 1,
                "load_best_model_at_end": True,
            },
            (3, 2),
        ),
    ],
)
def test_the_number_of_checkpoints_is_that_of_the_trainer(options: dict[str, Any], wanted: tuple[int, int]):
    assert saves(arguments(**options), num_chunks=99 if options.get("dataloader_drop_last") else 100) == wanted


@pytest.mark.parametrize(
    ("optim", "numbers"), [("adamw_torch", 2), ("adamw_torch_fused", 2), ("sgd", 0), ("rmsprop", 1), ("lion_32bit", 2)]
)
def test_an_optimizer_keeps_so_many_numbers_for_each_weight(optim: str, numbers: int):
    assert optimizer_bytes(arguments(optim=optim), 40) == numbers * 40


def test_what_a_run_really_takes_is_what_was_estimated(
    tiny: Path, corpus: Path, outputs: Path, store: Path, monkeypatch: pytest.MonkeyPatch
):
    """Within a few percent: the estimate is of use only if it is near."""
    asked: list[int] = []
    monkeypatch.setattr(disk, "require_free", lambda folder, needed, kept: asked.append(needed))
    assert main(request(tiny, corpus, "epochs=3", "trainer.save_total_limit=1")) == 0
    files = {path.stat().st_ino: path.stat().st_size for path in outputs.rglob("*") if path.is_file()}
    large = sum(size for size in files.values() if size > MB)
    small = sum(files.values()) - large
    checkpoint = disk.bytes_below(next(outputs.glob("train/*/checkpoints/checkpoint-*")))
    assert large + checkpoint == pytest.approx(asked[0] - disk.OTHER_BYTES, rel=0.05)
    assert small < disk.OTHER_BYTES


# ---------------------------------------------------------------------------------------- the refusal


def request(tiny: Path, corpus: Path, *more: str) -> list[str]:
    sizes = ["dataset.train_chunks=8", "dataset.eval_chunks=4", "chunk_size=16", "epochs=1", "heldout.documents=4"]
    return ["train", f"model.path={tiny}", "dataset=files", f"dataset.path={corpus}", *sizes, *more]


def test_a_run_without_enough_space_is_refused_and_leaves_nothing(
    tiny: Path,
    corpus: Path,
    outputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    looked_at: list[Path] = []

    def usage(path: Path) -> Usage:
        looked_at.append(Path(path))
        return Usage(10**9, 10**9 - 20_000_000, 20_000_000)

    monkeypatch.setattr(disk.shutil, "disk_usage", usage)
    assert main(request(tiny, corpus, "epochs=3")) == 2
    error = capsys.readouterr().err
    for words in ("will take up to", "20 MB are free", "keep=1", "MLMX_OUTPUTS=<folder>"):
        assert words in error
    assert error.count("\n") == 1
    assert not outputs.exists()
    assert looked_at
    assert all(outputs.is_relative_to(path) or path.is_relative_to(outputs) for path in looked_at)


def test_the_limit_is_where_the_estimate_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
    disk.require_free(tmp_path / "not" / "there", 1000, kept=1)
    with pytest.raises(RequestError, match="up to 1 kB, and 1 kB are free") as refused:
        disk.require_free(tmp_path, 1001, kept=1)
    assert "keep=" not in str(refused.value), "one is the least"


def test_checkpoints_that_are_there_are_not_asked_for_again(
    tiny: Path, corpus: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlmx.training.trainer import Trainer

    asked: list[int] = []
    monkeypatch.setattr(disk, "require_free", lambda folder, needed, kept: asked.append(needed))
    compute_loss = Trainer.compute_loss

    def breaks(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 1:
            raise RuntimeError("an error in the second epoch")
        return compute_loss(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", breaks)
    assert main(request(tiny, corpus, "epochs=2", "tracking=none")) == 1
    (checkpoint,) = outputs.glob("train/*/checkpoints/checkpoint-*")
    there = disk.bytes_below(checkpoint)
    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
    assert main(["train", "resume=last"]) == 0
    assert asked[0] - asked[1] == there > MB


# ---------------------------------------------------------------------------------------- a full disk


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    sqlite3.OperationalError("database or disk is full"),
    caused(RuntimeError("the dataset could not be made"), OSError(errno.ENOSPC, "No space left on device")),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_known_in_whatever_a_library_makes_of_it(error: Exception):
    assert disk.is_full(error)
    code, line = explain(error, "prepare")
    assert code == 1
    assert line.startswith("disk full: a file could not be written")
    assert "make space and run the command again" in line


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("space"), None])
def test_other_errors_are_not_of_a_full_disk(error: Exception | None):
    assert not disk.is_full(error)


def test_the_line_names_the_file_the_space_and_the_way_on(tmp_path: Path):
    with pytest.raises(OSError, match="No space left") as full, disk.writing(tmp_path / "checkpoint-3"):
        raise FULL[2]
    line = str(disk.disk_full(full.value, tmp_path / "a run"))
    free = disk.in_words(disk.free_bytes(tmp_path))
    assert line.startswith(f"disk full: {tmp_path / 'checkpoint-3'} could not be written (")
    assert free.split()[1] in line
    assert line.endswith(f"make space and go on: python -m mlmx train resume='{tmp_path / 'a run'}'")
    again = disk.disk_full(disk.disk_full(full.value, tmp_path / "a run"))
    assert explain(again, "train") == (1, line)


def test_what_is_no_full_disk_passes_as_it_is(tmp_path: Path):
    error = ValueError("something else")
    with pytest.raises(ValueError, match="something else") as passed, disk.writing(tmp_path):
        raise error
    assert passed.value is error


def test_the_reserve_takes_space_until_it_is_released(tmp_path: Path):
    disk.reserve(tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == disk.RESERVE_BYTES
    assert file.stat().st_blocks * 512 >= disk.RESERVE_BYTES, "no hole in a file"
    disk.release(tmp_path)
    disk.release(tmp_path)
    assert list(tmp_path.iterdir()) == []
    disk.reserve(tmp_path / "nowhere")  # no run fails for want of it


@pytest.mark.parametrize(("size", "words"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (3.21e9, "3.21 GB")])
def test_sizes_are_said_in_words(size: float, words: str):
    assert disk.in_words(math.floor(size)) == words


def test_an_error_that_ended_a_run_is_not_hidden_by_one_of_saying_so(
    tiny: Path, corpus: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from mlmx.config import whole
    from mlmx.runs.run import all_runs
    from mlmx.training.trainer import Trainer

    def broken(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(whole, "write", full)
        raise RuntimeError("the first error")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = whole.write
    monkeypatch.setattr(Trainer, "compute_loss", broken)
    assert main(request(tiny, corpus, "tracking=none")) == 1
    said = capsys.readouterr()
    assert said.err == "mlmx: RuntimeError: the first error (MLMX_DEBUG=1 shows where)\n"
    assert "that it is FAILED could not be written" in said.out
    monkeypatch.setattr(whole, "write", write)
    (run,) = all_runs()
    assert run.status == "RUNNING"
    assert main(["doctor"]) == 0
    assert run.read_json("result.json")["resumable"] is True
    assert run.status == "KILLED"
