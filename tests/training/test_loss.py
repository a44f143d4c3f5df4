"""One loss whatever an effective batch is cut into: loss, gradient and weights, for every head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from mlmx.models.head import masked_logits
from mlmx.training.arguments import training_arguments
from tests.support.models import CONFIGS, Notes, Rows, stack
from tests.support.processes import distributed, ended, run_distributed, started

CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]
STEPS = 5


def trained(family: str, counts: list[int], batch_size: int, accumulation: int, folder: Path) -> tuple[Notes, Any]:
    from mlmx.training.trainer import Trainer

    torch.manual_seed(1)
    config = CONFIGS[family]
    loaded = AutoModelForMaskedLM.from_config(config)
    for part in loaded.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    options = {
        "name": "corrected",
        "gradient_accumulation_steps": accumulation,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "max_grad_norm": 0.5,
        "train_sampling_strategy": "sequential",
    }
    dials = {"lr": 1e-4, "epochs": 1, "batch_size": batch_size, "weight_decay": 0.01, "seed": 42, "precision": "fp32"}
    notes = Notes()
    trainer = Trainer(
        "corrected",
        training_arguments(options, folder, **dials),
        model=loaded,
        tokenizer=None,
        train_chunks=Rows(counts),
        eval_chunks=Rows(counts),
        mask=stack,
        mlm_probability=0.15,
        masked_logits=masked_logits,
        scores=lambda trained: {},
        recorder=notes,
    )
    trainer.train()
    return notes, torch.cat([p.detach().flatten() for p in loaded.parameters()])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("counts", "cuts"), [([2], [CUTS[0], CUTS[2]]), ([1, 12, 1, 1, 1, 3, 1, 16], CUTS)], ids=["equal", "very unequal"]
)
def test_a_batch_may_be_cut_into_any_micro_batches(
    family: str, counts: list[int], cuts: list[tuple[int, int]], tmp_path: Path
):
    results = [trained(family, counts, *cut, tmp_path) for cut in cuts]
    (whole, weights), others = results[0], results[1:]
    assert len(whole.rows) == STEPS
    for notes, cut_weights in others:
        for mine, theirs in zip(notes.rows, whole.rows, strict=True):
            for name in ("train/loss", "train/grad_norm"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name
        assert torch.linalg.norm(cut_weights - weights) <= 1e-6 * torch.linalg.norm(weights)


def test_an_effective_batch_without_targets_has_loss_0(tmp_path: Path):
    notes, weights = trained("bert", [0], 4, 2, tmp_path)
    assert [row["train/loss"] for row in notes.rows] == [0.0] * STEPS
    assert torch.isfinite(weights).all()


def one_of_two(rank: int, folder: Path) -> None:
    notes, weights = trained("distilbert", [1, 12, 1, 1, 1, 3, 1, 16], 4, 1, folder)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps([notes.rows, weights.tolist()]))


@pytest.mark.long
def test_two_processes_give_the_loss_of_one(tmp_path: Path):
    """A batch of 8 as 2 processes × 4: the same rows in each step, so the same loss, gradient and weights."""
    run_distributed(one_of_two, tmp_path)
    rows, weights = json.loads((tmp_path / "result.json").read_text())
    whole, whole_weights = trained("distilbert", [1, 12, 1, 1, 1, 3, 1, 16], 8, 1, tmp_path)
    for mine, theirs in zip(rows, whole.rows, strict=True):
        # The rate the library logs a loss at is per process; the mean over processes is the step's loss.
        assert mine["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-5)
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
    assert torch.linalg.norm(torch.tensor(weights) - whole_weights) <= 1e-6 * torch.linalg.norm(whole_weights)


@pytest.mark.long
def test_a_distributed_run_keeps_one_record(tiny: Path, corpus: Path, outputs: Path, tmp_path: Path):
    """``torchrun --nproc-per-node 2 -m mlmx train …``: one folder, one history, the loss of a single process."""
    from mlmx.commands import main
    from mlmx.runs.run import all_runs

    sizes = ["chunk_size=32", "dataset.train_chunks=16", "dataset.eval_chunks=8", "heldout.documents=3", "epochs=1"]
    fixed = ["train", f"model.path={tiny}", "dataset=files", f"dataset.path={corpus}", "precision=fp32", *sizes]
    given = [*fixed, "batch_size=4", "tracking=none"]
    processes = [started(given, outputs, tmp_path / "said.txt", environment) for environment in distributed()]
    assert [ended(process) for process in processes] == [0, 0]
    (two,) = all_runs()
    assert main.main([*fixed, "batch_size=8", "tracking=none"]) == 0
    alone = next(run for run in all_runs() if run.folder != two.folder)
    for name in ("train/loss", "train/grad_norm", "eval/loss", "heldout/loss"):
        values = [[row[name] for row in run.metrics() if name in row] for run in (two, alone)]
        assert values[0] == pytest.approx(values[1], rel=1e-5), name
