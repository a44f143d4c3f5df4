"""Scores are sums divided once: they move neither with batch size nor with padding, and repeat to the bit."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from mlmx.config.labels import IGNORE_INDEX
from mlmx.data.chunks import document
from mlmx.data.masking import masker, token
from mlmx.data.tokens import tokenize
from mlmx.evaluation.bootstrap import Sums
from mlmx.evaluation.scoring import METRICS, batches_of, numbers, score
from mlmx.models.encoders import load_model, pretrained, scratch
from mlmx.models.head import masked_logits


@pytest.fixture(scope="module")
def parts(tiny: Path, imdb, tokenizer):
    encoder = pretrained(path=str(tiny))
    loaded = load_model(encoder, tokenizer, seed=0)
    chunks = document(tokenize(imdb.select(range(30)), tokenizer), 64)
    mask = replace(masker(partial(token), tokenizer, 0.15, 42, (0.8, 0.1)), fixed=True)
    return loaded, chunks.select(torch.arange(40).numpy()), mask


def scored(parts, batch_size: int) -> Sums:
    loaded, chunks, mask = parts
    return score(loaded, batches_of(chunks, mask, batch_size), masked_logits)


def test_score_does_not_move_with_batch_size(parts):
    whole = scored(parts, 40)
    for batch_size in (1, 7, 16):
        other = scored(parts, batch_size)
        assert other.totals["loss"] == pytest.approx(whole.totals["loss"], rel=1e-6)
        assert (other.totals["accuracy"], other.tokens) == (whole.totals["accuracy"], whole.tokens)


def test_score_repeats_to_the_bit(parts):
    assert scored(parts, 7) == scored(parts, 7)


def test_score_is_additive(parts):
    loaded, chunks, mask = parts
    rows = torch.arange(40).numpy()
    halves = [scored((loaded, chunks.select(half), mask), 8) for half in (rows[:24], rows[24:])]
    whole = scored(parts, 8)
    assert (halves[0] + halves[1]).totals == pytest.approx(whole.totals, rel=1e-12)
    assert (halves[0] + halves[1]).tokens == whole.tokens


def test_score_is_the_cross_entropy_over_all_logits(parts):
    loaded, chunks, mask = parts
    batch = mask([chunks[i] for i in range(8)])
    with torch.no_grad():
        logits = loaded.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    found = score(loaded, [batch], masked_logits)
    assert found.totals["loss"] == pytest.approx(float(expected), rel=1e-6)
    chosen = batch["labels"] != IGNORE_INDEX
    assert found.totals["accuracy"] == int((logits.argmax(-1)[chosen] == batch["labels"][chosen]).sum())


def test_score_leaves_the_model_as_it_was_and_uses_no_dropout(parts, tokenizer):
    loaded = load_model(scratch(layers=1, hidden_size=32, heads=2, dropout=0.5), tokenizer, seed=0)
    _, chunks, mask = parts
    loaded.train()
    state = torch.random.get_rng_state()
    assert scored((loaded, chunks, mask), 8) == scored((loaded, chunks, mask), 8)
    assert loaded.training
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_batch_without_targets_counts_nothing(parts):
    loaded, chunks, mask = parts
    batch = mask([chunks[0]])
    empty = {**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
    assert score(loaded, [empty], masked_logits) == Sums()
    assert score(loaded, [empty, batch], masked_logits) == score(loaded, [batch], masked_logits)


def test_numbers():
    assert numbers(Sums(2, {"loss": 2 * math.log(3), "accuracy": 1})) == {
        "loss": pytest.approx(math.log(3)),
        "perplexity": pytest.approx(3.0),
        "accuracy": 0.5,
    }
    assert all(math.isnan(value) for value in numbers(Sums()).values())
    assert numbers(Sums(1, {"loss": 1e6}))["perplexity"] == math.inf
    assert math.isnan(numbers(Sums(1, {"loss": math.nan}))["perplexity"])


def test_a_metric_is_one_function(parts, monkeypatch: pytest.MonkeyPatch):
    def in_top_5(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits.topk(5).indices == labels[:, None]).any(1).float()

    monkeypatch.setitem(METRICS, "in_top_5", in_top_5)
    found = numbers(scored(parts, 8))
    assert found["accuracy"] <= found["in_top_5"] <= 1
