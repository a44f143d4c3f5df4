"""What only a CUDA device can show; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlmx.commands import main
from tests.support.models import CONFIGS, check_head
from tests.support.trainings import WEIGHTS, command, history, killed_at, last, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def bf16_or_skip() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no bf16 before Ampere")


@pytest.mark.parametrize("family", CONFIGS)
def test_a_fixed_number_of_rows_has_the_full_heads_loss_and_gradient(family: str):
    check_head(family, "cuda", room=40)


def test_auto_is_bf16_and_learns(tiny: Path, corpus: Path, capsys: pytest.CaptureFixture[str]):
    bf16_or_skip()
    run = train(tiny, corpus, "precision=auto", "trainer=gpu")
    assert "on cuda in bf16" in capsys.readouterr().out
    assert last(run, "eval/loss") < run.metrics()[0]["eval/loss"]
    assert 0 < last(run, "perf/mfu") < 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_ends_where_fp32_does(tiny: Path, corpus: Path, precision: str):
    bf16_or_skip()
    whole = train(tiny, corpus, "epochs=4")
    half = train(tiny, corpus, "epochs=4", f"precision={precision}", "trainer=gpu")
    assert last(half, "eval/loss") == pytest.approx(last(whole, "eval/loss"), rel=5e-3)


def test_the_device_trains_as_the_processor_does(tiny: Path, corpus: Path):
    """The same masks, the same losses: where a run is trained is no dial."""
    there, here = train(tiny, corpus), train(tiny, corpus, "trainer=cpu")
    for name in ("train/loss", "eval/loss"):
        assert last(there, name) == pytest.approx(last(here, name), rel=1e-4), name


def test_it_is_compiled_once_and_trains_as_before(tiny: Path, corpus: Path):
    bf16_or_skip()
    from torch._dynamo.utils import counters

    dials = ["precision=bf16", "trainer=gpu"]
    plain, graphs = train(tiny, corpus, *dials, "epochs=3"), []
    for epochs in (1, 3):
        torch.compiler.reset()
        counters.clear()
        compiled = train(tiny, corpus, *dials, f"epochs={epochs}", "trainer.torch_compile=true")
        graphs.append(counters["stats"]["unique_graphs"])
    assert last(compiled, "eval/loss") == pytest.approx(last(plain, "eval/loss"), rel=5e-3)
    assert graphs[0] == graphs[1] > 0


def test_a_resumed_run_has_the_same_points(tiny: Path, corpus: Path, outputs: Path):
    whole = outputs / "train" / "whole"
    assert main.main(command(tiny, corpus, whole)) == 0
    cut = killed_at(10, whole, outputs / "train" / "cut")
    assert main.main(["train", f"resume={cut}"]) == 0
    wanted, found = history(whole), history(cut)
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    assert found[-1]["eval/loss"] == pytest.approx(wanted[-1]["eval/loss"], rel=1e-4)
    theirs, ours = load_file(whole / WEIGHTS), load_file(cut / WEIGHTS)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


def test_a_batch_that_does_not_fit_is_split(tiny: Path, corpus: Path):
    dials = ["chunk_size=128", "batch_size=32", "dataset.train_chunks=64", "dataset.eval_chunks=2"]
    dials += ["trainer.per_device_eval_batch_size=2"]
    whole = train(tiny, corpus, *dials)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 500e6) / total)
    try:
        tight = train(tiny, corpus, *dials)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert last(tight, "perf/splits") >= 2
    assert last(tight, "eval/loss") == pytest.approx(last(whole, "eval/loss"), rel=1e-4)
