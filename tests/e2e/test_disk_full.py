"""A disk that becomes full: one line, the last good checkpoint is whole, and the run goes on once there is space.

On a small file system of its own, mounted for the test.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlmx.commands.main import main
from mlmx.runs import checkpoints
from mlmx.runs.disk import free_bytes
from mlmx.runs.run import Run, all_runs
from mlmx.training.trainer import Trainer

MB = 2**20


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size at a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def disk(outputs: Path) -> Iterator[Path]:
    """``outputs/`` on a disk with place for a run of `request`."""
    with small_disk(outputs, "120m") as folder:
        yield folder


def fill(disk: Path, leave: int = 0) -> None:
    """Take all space but ``leave`` bytes, as somebody else's file would."""
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while (free := free_bytes(disk) - leave) > 0:
            file.write(bytes(min(free, MB)))
    assert free_bytes(disk) <= max(leave, 4096)


def make_space(disk: Path) -> None:
    (disk / "ballast").unlink()


def request(tiny: Path, corpus: Path, *more: str) -> list[str]:
    """Three epochs of two steps."""
    sizes = ["dataset.train_chunks=8", "dataset.eval_chunks=4", "batch_size=4", "chunk_size=16", "epochs=3"]
    return ["train", f"model.path={tiny}", "dataset=files", f"dataset.path={corpus}", *sizes, *more]


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Arranges something to happen in the middle of an optimizer step, once."""

    def arrange(step: int, happens: Callable[[], None]) -> None:
        compute_loss = Trainer.compute_loss

        def watched(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == step:
                monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
                happens()
            return compute_loss(trainer, *args, **kwargs)

        monkeypatch.setattr(Trainer, "compute_loss", watched)

    return arrange


def half_written(outputs: Path) -> list[Path]:
    return [path for pattern in (".*.tmp", ".tokens-*", ".reserve") for path in outputs.rglob(pattern)]


def points(run: Run) -> list[tuple[int, str, float]]:
    """All numbers of a run that the clock has no part in."""
    clock = ("step", "time", "train/tokens_per_second", "perf/tokens_per_second", "perf/mfu")
    return [(row["step"], name, value) for row in run.metrics() for name, value in row.items() if name not in clock]


def mlflow_run(outputs: Path, run: Run) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}").get_run(run.read_json("result.json")["run_id"])


@functools.cache
def uninterrupted(more: tuple[str, ...], tiny: Path, corpus: Path) -> list[tuple[int, str, float]]:
    """The numbers of a run that never met a full disk."""
    assert main(request(tiny, corpus, *more, "tracking=none")) == 0
    return sorted(points(all_runs()[-1]))


def resumed_like_uninterrupted(run: Run, tiny: Path, corpus: Path, more: list[str]) -> None:
    """Going on gives the numbers of a run that never met a full disk."""
    assert main(["train", f"resume={run.folder}"]) == 0
    assert run.status == "FINISHED"
    assert half_written(run.folder) == []
    found = points(run)
    assert len({(step, name) for step, name, _ in found if name != "epoch"}) == len(
        [name for _, name, _ in found if name != "epoch"]
    ), "no point twice"
    assert sorted(found) == uninterrupted(tuple(more), tiny, corpus)


def assert_ended_by_a_full_disk(run: Run, stderr: str, what: Path) -> None:
    assert stderr.count("\n") == 1
    assert stderr.startswith(f"mlmx: disk full: {what} could not be written (")
    assert stderr.endswith(f" free there); make space and go on: python -m mlmx train resume={run.folder}\n")
    result = run.read_json("result.json")
    assert (result["status"], result["resumable"]) == ("FAILED", True)
    assert half_written(run.folder) == []


def test_full_while_a_checkpoint_is_written(
    disk: Path, tiny: Path, corpus: Path, store: Path, at_step: Any, capsys: pytest.CaptureFixture[str]
):
    at_step(3, lambda: fill(disk, leave=4 * MB))  # the weights have place, the optimizer has not
    assert main(request(tiny, corpus)) == 1
    (run,) = all_runs()
    said = capsys.readouterr()
    assert_ended_by_a_full_disk(run, said.err, run.checkpoints / "checkpoint-4")
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-2"]
    checkpoints.verify(run.checkpoints / "checkpoint-2")
    assert mlflow_run(disk, run).info.status == "FAILED"

    assert main(["train", f"resume={run.folder}"]) == 2, "it is asked for first"
    assert "are free there; make space" in capsys.readouterr().err
    assert run.status == "FAILED"

    make_space(disk)
    resumed_like_uninterrupted(run, tiny, corpus, [])
    assert mlflow_run(disk, run).info.status == "FINISHED"


def test_full_while_numbers_are_logged(
    disk: Path, tiny: Path, corpus: Path, store: Path, at_step: Any, capsys: pytest.CaptureFixture[str]
):
    """Not a byte is left: what is kept back for this case has to do for the ending."""
    steps = ["trainer.logging_strategy=steps", "trainer.logging_steps=1"]

    def happens() -> None:
        fill(disk)
        (run,) = all_runs()
        with (run.folder / "metrics.jsonl").open("ab", buffering=0) as file:
            file.write(b"\n" * 8192)  # its last page has place for so many of these as there are

    at_step(1, happens)
    assert main(request(tiny, corpus, *steps)) == 1
    (run,) = all_runs()
    said = capsys.readouterr()
    assert_ended_by_a_full_disk(run, said.err, run.folder / "metrics.jsonl")
    assert list(run.checkpoints.iterdir()) == [], "and yet it can begin again"
    assert mlflow_run(disk, run).info.status == "FAILED"
    whole = [line for line in (run.folder / "metrics.jsonl").read_text().splitlines() if line]
    assert all(line.startswith("{") and line.endswith("}") for line in whole)
    assert "Logging error" not in said.out + said.err
    make_space(disk)
    resumed_like_uninterrupted(run, tiny, corpus, steps)


def test_full_while_the_model_is_saved_at_the_end(
    disk: Path, tiny: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write = checkpoints.write

    def meets_a_full_disk(folder: Path, *args: Any, **kwargs: Any) -> None:
        if folder.name == "model":
            monkeypatch.setattr(checkpoints, "write", write)
            fill(disk)
        write(folder, *args, **kwargs)

    monkeypatch.setattr(checkpoints, "write", meets_a_full_disk)
    assert main(request(tiny, corpus, "tracking=none")) == 1
    (run,) = all_runs()
    assert_ended_by_a_full_disk(run, capsys.readouterr().err, run.model)
    assert not run.model.exists()
    make_space(disk)
    resumed_like_uninterrupted(run, tiny, corpus, [])
    assert (run.model / "model.safetensors").is_file()


def test_a_full_store_costs_the_run_nothing_and_gets_everything_later(
    tiny: Path,
    corpus: Path,
    store: Path,
    outputs: Path,
    tmp_path: Path,
    at_step: Any,
    capsys: pytest.CaptureFixture[str],
):
    from mlflow import MlflowClient

    from mlmx.tracking.mirror import update
    from mlmx.tracking.store import local

    steps = ["trainer.logging_strategy=steps", "trainer.logging_steps=1"]
    with small_disk(tmp_path / "other", "8m") as other:
        (other / "mlflow.db").write_bytes(store.read_bytes())
        store.unlink()
        store.symlink_to(other / "mlflow.db")
        at_step(1, lambda: fill(other))
        assert main(request(tiny, corpus, *steps)) == 0
        said = capsys.readouterr()
        assert said.err == ""
        (run,) = all_runs()
        assert run.status == "FINISHED"
        assert "database or disk is full" in said.out
        assert f"python -m mlmx sync run={run.folder}" in said.out
        make_space(other)
        update(run, local())
        assert mlflow_run(outputs, run).info.status == "FINISHED"
        client = MlflowClient(f"sqlite:///{store}")
        history = client.get_metric_history(run.read_json("result.json")["run_id"], "train/loss")
        assert [(p.step, p.value) for p in history] == [(s, v) for s, name, v in points(run) if name == "train/loss"]


def test_a_full_cache_costs_the_next_run_its_tokens_and_this_one_nothing(
    tiny: Path, corpus: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
):
    with small_disk(outputs / "cache", "16k") as cache:
        assert main(request(tiny, corpus, "tracking=none", "epochs=1")) == 0
        said = capsys.readouterr()
        assert said.err == ""
        assert f"{cache}: the tokens cannot be kept for later runs" in said.out
        assert half_written(cache) == []


def test_full_at_the_very_start(
    tiny: Path, corpus: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Taken by somebody else between the question and the first file."""
    with small_disk(outputs, "120m") as disk:
        monkeypatch.setattr("mlmx.commands.train.require_space", lambda *parts: fill(disk))
        assert main(request(tiny, corpus, "tracking=none")) == 1
        error = capsys.readouterr().err
        assert error.startswith("mlmx: disk full: ")
        assert error.endswith("make space and run the command again\n")
        assert error.count("\n") == 1
        assert all_runs() == []
        assert [path.name for path in disk.rglob("*") if path.is_file()] == ["ballast"]
