"""Kept tokens are the tokens, by content: read by later runs, never for other texts or tokenizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from mlmx import cli, data
from mlmx.runs import all_runs


def test_kept_tokens_are_the_same_and_memory_mapped(tmp_path: Path, tokenizer):
    texts = Dataset.from_dict({"text": ["One film.", "Unbelievably good!"]})
    made = data.tokenize(texts, tokenizer)
    for _ in range(2):
        kept = data.tokens_of(texts, tokenizer, tmp_path, keep=True)
        assert isinstance(kept.ids, np.memmap)
        for name in ("ids", "word_starts", "offsets"):
            assert np.array_equal(getattr(kept, name), getattr(made, name))
        assert (kept.num_prefix, kept.num_suffix) == (made.num_prefix, made.num_suffix)
    assert len(list(tmp_path.iterdir())) == 1, "one entry, nothing half-written beside it"


def test_only_prepare_keeps(tmp_path: Path, tokenizer):
    data.tokens_of(Dataset.from_dict({"text": ["One film."]}), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_texts_are_another_entry(tmp_path: Path, tokenizer):
    for text in ("one", "two"):
        data.tokens_of(Dataset.from_dict({"text": [text]}), tokenizer, tmp_path, keep=True)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("trainer", ["reference", "default"])
def test_a_prepared_run_is_the_run_without(tiny: Path, corpus: Path, outputs: Path, trainer: str):
    dials = [f"model.path={tiny}", "dataset=files", f"dataset.path={corpus}", "chunk_size=32"]
    sizes = ["dataset.train_chunks=16", "dataset.eval_chunks=8", "epochs=1", "tracking=none", "trainer.use_cpu=true"]
    command = ["train", f"trainer={trainer}", *dials, *sizes]
    assert cli.main(command) == 0
    assert cli.main(["prepare", *dials, "dataset.train_chunks=16", "dataset.eval_chunks=8"]) == 0
    (entry,) = (outputs / "cache").iterdir()
    assert cli.main(command) == 0
    first, prepared = (run.read_json("result.json")["metrics"] for run in all_runs())
    assert {k: v for k, v in first.items() if "second" not in k} == {
        k: v for k, v in prepared.items() if "second" not in k
    }
    assert entry.is_dir()
