"""However real processes end, no run has a wrong status, neither in its folder nor in MLflow."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from mlmx.commands.main import main
from mlmx.runs.run import Run
from tests.support.processes import ended, reached, started, wait_until

ENDINGS = ("done", "error", "SIGINT", "SIGTERM", "SIGKILL")
STATUS = {0: "FINISHED", 1: "FAILED", 130: "KILLED", 143: "KILLED", -signal.SIGKILL: "KILLED"}


@dataclass(frozen=True)
class Started:
    """A run in a process of its own, and how it is to end."""

    folder: Path
    ending: str
    process: ForkServerProcess

    def end(self) -> int:
        """Its exit code."""
        if self.ending.startswith("SIG") and self.process.is_alive():
            assert self.process.pid is not None
            os.kill(self.process.pid, signal.Signals[self.ending])
        return ended(self.process) or 0

    def is_known(self) -> bool:
        """Whether it trains, and MLflow knows it."""
        return reached(self.folder, 3) and bool(Run(self.folder).read_json("result.json").get("run_id"))


def start(name: str, ending: str, tiny: Path, corpus: Path, outputs: Path) -> Started:
    folder = outputs / "train" / name
    settings = {
        "model.path": tiny,
        "dataset": "files",
        "dataset.path": corpus,
        "dataset.train_chunks": 4,
        "dataset.eval_chunks": 2,
        "heldout.documents": 2,
        "batch_size": 2,
        "chunk_size": 16,
        "epochs": 4000 if ending.startswith("SIG") else 2,
        "trainer.logging_strategy": "steps",
        "trainer.logging_steps": 1,
        "trainer.save_total_limit": 1,
        "trainer.save_strategy": "steps",
        "trainer.save_steps": 3,
        "hydra.run.dir": folder,
    }
    if ending == "error":
        folder.mkdir(parents=True)
        (folder / "checkpoints").write_text("in the way of the first checkpoint")
    argv = ["train", *(f"{key}={value}" for key, value in settings.items())]
    return Started(folder, ending, started(argv, outputs, outputs.parent / f"{name}.txt"))


def statuses(outputs: Path) -> dict[str, str]:
    """What MLflow says of each of its runs, by the name of its folder; a folder has one."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mlmx").experiment_id
    found = [(Path(run.data.tags["mlmx.folder"]).name, run) for run in client.search_runs([experiment])]
    assert len(dict(found)) == len(found)
    return {name: run.info.status for name, run in found}


@pytest.mark.usefixtures("store")
def test_after_mixed_endings_every_status_is_true(tiny: Path, corpus: Path, outputs: Path, capsys: Any):
    living = start("living", "SIGINT", tiny, corpus, outputs)
    codes = {}
    for ending in ("done", "error", "SIGTERM", "SIGKILL"):  # one beside the living one
        run = start(ending, ending, tiny, corpus, outputs)
        if ending.startswith("SIG"):
            wait_until(run.is_known, run.process)
        codes[ending] = run.end()
    assert codes == {"done": 0, "error": 1, "SIGTERM": 143, "SIGKILL": -9}
    wait_until(living.is_known, living.process)
    true = {ending: STATUS[code] for ending, code in codes.items()} | {"living": "RUNNING"}
    assert statuses(outputs) == true | {"SIGKILL": "RUNNING"}, "what nobody could say"

    assert main(["doctor"]) == 0
    assert {name: Run(outputs / "train" / name).status for name in true} == true
    assert statuses(outputs) == true
    said = capsys.readouterr().out
    assert f"running  {living.folder}: process {living.process.pid} on " in said
    assert f"train resume={outputs / 'train' / 'SIGKILL'}" in said

    assert living.end() == 130
    assert main(["doctor"]) == 0
    assert living.folder.name in statuses(outputs)
    assert statuses(outputs) == true | {"living": "KILLED"}
    resumable = {name: Run(outputs / "train" / name).read_json("result.json")["resumable"] for name in true}
    # What failed before its first checkpoint would fail again.
    assert resumable == {name: name not in ("done", "error") for name in true}


MOMENTS = ("loading", "begun", 0, 1, 2, 3, 10, 40)


def has_come_to(folder: Path, moment: str | int) -> bool:
    if moment == "loading":
        return True
    return (folder / "result.json").is_file() if moment == "begun" else reached(folder, int(moment))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("store")
def test_after_50_mixed_endings_at_any_moment_every_status_is_true(tiny: Path, corpus: Path, outputs: Path):
    draw = random.Random(7)
    endings = [*ENDINGS * 10]
    draw.shuffle(endings)
    codes: dict[str, int] = {}
    for pair in zip(endings[::2], endings[1::2], strict=True):
        both = [start(f"{len(codes) + n:02} {ending}", ending, tiny, corpus, outputs) for n, ending in enumerate(pair)]
        for run in both:
            if run.ending.startswith("SIG"):
                wait_until(partial(has_come_to, run.folder, draw.choice(MOMENTS)), run.process)
                time.sleep(draw.uniform(0, 0.3))
            codes[run.folder.name] = run.end()
        assert main(["doctor"]) == 0
    true = {name: STATUS[code] for name, code in codes.items() if (outputs / "train" / name / "result.json").is_file()}
    assert len(true) > 35, "the others were ended before they had begun"
    assert {name: Run(outputs / "train" / name).status for name in true} == true
    told = statuses(outputs)
    assert told == {name: status for name, status in true.items() if name in told}
    known = {name for name in true if Run(outputs / "train" / name).read_json("result.json").get("run_id")}
    assert known <= told.keys()
    assert len(known) > 25
