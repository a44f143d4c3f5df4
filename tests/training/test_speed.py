"""What the speed is made of: freed memory is kept, operations are counted, dropout is ours on the CPU."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AlbertConfig, AutoModelForMaskedLM, BertConfig, DistilBertConfig

from mlmx.kernels import flops, memory
from mlmx.kernels.flops import flops_per_token, matmul_peak
from mlmx.models import head
from mlmx.runs.run import Run
from tests.support.trainings import train, train_scratch

FAULTS = """
import resource, sys
from mlmx.kernels.memory import keep_freed
import torch
if sys.argv[1] == "kept":
    assert keep_freed()
for _ in range(20):  # the heap grows to what is asked of it
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_being_mapped_anew():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "given back")
    }
    assert faults["kept"] < 100
    assert faults["given back"] > 10 * faults["kept"], "else this test could not fail"


def test_training_gives_logits_of_few_shapes_whatever_the_number_of_targets(
    tiny: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
):
    """A kernel is made for each shape: a step in which all are new took a quarter longer."""
    own, seen = head.masked_logits, []

    def spy(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, labels = own(*args)
        if torch.is_grad_enabled():
            seen.append((len(logits), int(labels.ne(-100).sum())))
        return logits, labels

    monkeypatch.setattr(head, "masked_logits", spy)
    train(tiny, corpus, "masking=whole_word", "chunk_size=48", "dataset.train_chunks=64")
    assert len({targets for _, targets in seen}) > 2
    assert all(rows == -(-targets // 32) * 32 for rows, targets in seen)


HUGE = """
import re, resource, sys
from pathlib import Path
from mlmx.kernels.memory import keep_freed

def size(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

if sys.argv[1] == "rationed":
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))
before = size("VmRSS")
addresses = size("VmSize")
assert keep_freed()
assert size("VmRSS") - before < 10 << 20
assert sys.argv[1] == "at will" or size("VmSize") - addresses < 10 << 20
parts = Path("/proc/self/smaps").read_text().split("VmFlags:")
print(sum(" hg" in flags.splitlines()[0] and "[heap]" in part for part, flags in zip(parts, parts[1:])))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
@pytest.mark.parametrize(("addresses", "asked"), [("at will", True), ("rationed", False)])
def test_the_heap_asks_for_huge_pages_and_takes_no_memory_for_it(addresses: str, asked: bool):
    found = subprocess.run([sys.executable, "-c", HUGE, addresses], capture_output=True, text=True, check=True).stdout
    assert (int(found) > 0) is asked


@pytest.mark.parametrize(("chunk_size", "masked", "full"), [(512, 304.7, 427.3), (128, 283.5, 406.1)])
def test_operations_per_token_are_those_worked_out_by_hand(chunk_size: int, masked: float, full: float):
    with torch.device("meta"):
        distilbert = AutoModelForMaskedLM.from_config(DistilBertConfig())
    assert flops_per_token(distilbert, chunk_size, 0.15) / 1e6 == pytest.approx(masked, abs=0.05)
    assert flops_per_token(distilbert, chunk_size) / 1e6 == pytest.approx(full, abs=0.05)


def test_shared_layers_count_as_often_as_they_are_run():
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    bert, albert = (
        AutoModelForMaskedLM.from_config(config)
        for config in (BertConfig(**sizes, vocab_size=50), AlbertConfig(**sizes, vocab_size=50, embedding_size=32))
    )
    # Without the heads, ALBERT does what BERT does and projects its embeddings once.
    assert flops_per_token(albert, 16, 0.0) == pytest.approx(flops_per_token(bert, 16, 0.0) + 6 * 32 * 32 * 4, rel=0.01)


def test_measuring_the_machine_leaves_the_random_state_alone():
    matmul_peak.cache_clear()
    before = torch.get_rng_state()
    assert matmul_peak("cpu", torch.float32) > 1e6
    assert torch.equal(torch.get_rng_state(), before)


def test_a_precision_that_is_only_imitated_is_not_measured_for_long(monkeypatch: pytest.MonkeyPatch):
    own, products = torch.mm, []

    def slow(*args: Any, **kwargs: Any) -> torch.Tensor:
        products.append(1)
        time.sleep(0.02)
        return own(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", slow)
    monkeypatch.setattr(flops, "MEASURED_SECONDS", 0.01)
    matmul_peak.cache_clear()
    assert matmul_peak("cpu", torch.float32) > 0
    assert products == [1]
    matmul_peak.cache_clear()


def test_what_is_alive_is_settled_and_what_is_left_behind_is_cleared():
    class Left:
        pass

    memory.settle()
    left, mark = Left(), weakref.WeakSet()
    left.itself = left
    mark.add(left)
    del left
    assert mark, "in a cycle, it waits for the collector"
    memory.settle()
    assert not mark
    assert gc.get_freeze_count() > 0


def test_a_run_reports_its_speed_and_its_share_of_the_machine(tiny: Path, corpus: Path):
    run: Run = train(tiny, corpus)
    rows = [row for row in run.metrics() if "train/loss" in row]
    assert rows
    for row in rows:
        assert 0 < row["perf/mfu"] < 1.2
        assert 0 < row["perf/tokens_per_second"] <= row["train/tokens_per_second"]


def test_training_on_the_cpu_uses_our_dropout_and_scoring_none(
    tiny: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlmx.kernels import cpu

    drawn = []
    original = cpu.Draws.draw
    monkeypatch.setattr(cpu.Draws, "draw", lambda self, shape: drawn.append(shape) or original(self, shape))
    train(tiny, corpus)
    assert drawn == [], "the tiny model has no dropout"
    train_scratch(corpus, ["model=scratch", "model.layers=1", "model.hidden_size=32", "model.heads=2"])
    lengths = {shape[-1] for shape in drawn}
    assert 32 in lengths, "hidden states"
    assert any(len(shape) == 3 for shape in drawn), "attention probabilities"
