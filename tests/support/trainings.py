"""Short trainings of a tiny model, and what they leave."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from mlmx.commands.main import main
from mlmx.runs.run import Run, all_runs

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
            whole / f"checkpoints/checkpoint-{number}",
            folder / f"checkpoints/checkpoint-{number}",
            copy_function=os.link,
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


def train(tiny: Path, corpus: Path, *overrides: str) -> Run:
    parts = [f"model.path={tiny}", "dataset=files", f"dataset.path={corpus}", "chunk_size=32", "precision=fp32"]
    sizes = ["dataset.train_chunks=40", "dataset.eval_chunks=8", "epochs=1", "lr=1e-3", "tracking=none"]
    given = {override.partition("=")[0] for override in overrides}
    kept = [one for one in [*parts, *sizes] if one.partition("=")[0] not in given]
    assert main(["train", *kept, *overrides]) == 0
    return all_runs()[-1]


def last(run: Run, name: str) -> float:
    return [row[name] for row in run.metrics() if name in row][-1]


def train_scratch(corpus: Path, overrides: list[str]) -> Run:
    data = ["dataset=files", f"dataset.path={corpus}", "dataset.train_chunks=40", "dataset.eval_chunks=8"]
    dials = ["chunk_size=32", "epochs=1", "precision=fp32", "tracking=none"]
    assert main(["train", *overrides, *data, *dials]) == 0
    return all_runs()[-1]
