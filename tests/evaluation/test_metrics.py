"""Every logged number has a direction, which is known without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlmx.evaluation.metrics import higher_is_better

MORE = ["accuracy", "heldout/accuracy", "final/heldout_accuracy_rare", "final/heldout_accuracy_first"]
MORE += ["evaluate/heldout/accuracy", "words/top5_accuracy", "train/tokens_per_second", "perf/mfu"]
LESS = ["heldout/loss", "eval/perplexity", "heldout/bits_per_byte", "final/heldout_loss_rare", "train/grad_norm"]
LESS += ["minutes", "heldout/inaccuracy", "heldout/accuracy_spread", "perf/peak_memory_gib"]


@pytest.mark.parametrize(("name", "expected"), [*((n, True) for n in MORE), *((n, False) for n in LESS)])
def test_direction(name: str, expected: bool):
    assert higher_is_better(name) is expected


def test_directions_and_runs_side_by_side_need_no_torch():
    code = "import sys, mlmx.comparison.ranking as r; r.higher_is_better('a/b'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
