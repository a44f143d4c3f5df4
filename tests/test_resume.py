"""A resumed run is the run that was never interrupted: to the bit, in the same folder, with no point twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mlmx.cli import main
from mlmx.runs import Run

STEPS = 20
CLOCK = ("time", "train/tokens_per_second", "perf/tokens_per_second", "perf/mfu")
WEIGHTS = "model/model.safetensors"


def command(tiny: Path, corpus: Path, folder: Path, *more: str, accumulation: int = 1, workers: int = 0) -> list[str]:
    """20 optimizer steps in two epochs, a checkpoint and a point after each."""
    settings = {
        "model": "distilbert",
        "model.path": tiny,
        "dataset": "files",
        "dataset.path": corpus,
        "dataset.train_chunks": 10 * 4 * accumulation,
        "dataset.eval_chunks": 8,
        "heldout.documents": 4,
        "chunk_size": 24,
        "batch_size": 4,
        "epochs": 2,
        "lr": "1e-3",
        "tracking": "none",
        "trainer.logging_strategy": "steps",
        "trainer.logging_steps": 1,
        "trainer.save_strategy": "steps",
        "trainer.save_steps": 1,
        "trainer.gradient_accumulation_steps": accumulation,
        "trainer.dataloader_num_workers": workers,
        "hydra.run.dir": folder,
    }
    return ["train", *(f"{key}={value}" for key, value in settings.items()), *more]


def history(folder: Path) -> list[dict[str, Any]]:
    """The points of a run without what the clock says, the metrics of a step joined."""
    joined: dict[int, dict[str, Any]] = {}
    for row in Run(folder).metrics():
        assert not joined.get(row["step"], {}).keys() & row.keys() - {"step", "epoch", *CLOCK}, "a point twice"
        joined[row["step"]] = joined.get(row["step"], {}) | row
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in joined.values()]


def same(one: Path, other: Path) -> bool:
    """Whether two safetensors files hold the same bits."""
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(bool((left[name] == right[name]).all()) for name in left)


def killed_at(step: int, whole: Path, folder: Path) -> Path:
    """The folder of a run as a SIGKILL leaves it right after the checkpoint of a step."""
    ignored = shutil.ignore_patterns("checkpoint-*", "model", "plots")
    shutil.copytree(whole, folder, ignore=ignored)
    (folder / "checkpoints").mkdir(exist_ok=True)
    for number in range(1, step + 1):
        shutil.copytree(
            whole / f"checkpoints/checkpoint-{number}", folder / f"checkpoints/checkpoint-{number}", copy_function=os.link
        )
    lines = (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    # the log, the checkpoint and what the end of an epoch brings come in this order
    kept = [line for line in lines if json.loads(line)["step"] <= step and not (owed(line, step))]
    (folder / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
    Run(folder).write_json("result.json", Run(folder).read_json("result.json") | {"status": "RUNNING"})
    return folder


def owed(line: str, step: int) -> bool:
    row = json.loads(line)
    return bool(row["step"] == step and "train/loss" not in row)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Path, corpus: Path):
    """Makes uninterrupted runs, each once."""
    made: dict[tuple[int, int], Path] = {}

    def make(accumulation: int = 1, workers: int = 0) -> Path:
        key = (accumulation, workers)
        if key not in made:
            outputs = tmp_path_factory.mktemp("whole") / "outputs"
            before = os.environ["MLMX_OUTPUTS"]
            os.environ["MLMX_OUTPUTS"] = str(outputs)
            folder = outputs / "train" / "whole"
            assert main(command(tiny, corpus, folder, accumulation=accumulation, workers=workers)) == 0
            os.environ["MLMX_OUTPUTS"] = before
            made[key] = folder
        return made[key]

    return make


def check_resumed(folder: Path, wanted: Path) -> None:
    assert main(["train", f"resume={folder}"]) == 0
    assert same(folder / WEIGHTS, wanted / WEIGHTS)
    for name in ("model.safetensors", "optimizer.safetensors"):
        last = f"checkpoints/checkpoint-{STEPS}/{name}"
        assert same(folder / last, wanted / last)
    assert history(folder) == history(wanted)
    assert Run(folder).status == "FINISHED"


SAMPLE = [(1, 1, 0), (7, 1, 0), (10, 1, 0), (20, 1, 0), (13, 4, 2)]
MATRIX = [(step, accumulation, workers) for step in range(1, STEPS + 1) for accumulation in (1, 4) for workers in (0, 2)]


@pytest.mark.parametrize(("step", "accumulation", "workers"), SAMPLE)
def test_resuming_at_a_step_gives_the_uninterrupted_run(step, accumulation, workers, whole, outputs):
    wanted = whole(accumulation, workers)
    check_resumed(killed_at(step, wanted, outputs / "train" / "killed"), wanted)
