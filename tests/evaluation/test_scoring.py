"""Scores are sums divided once: they move neither with batch size nor with padding, and repeat to the bit."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlmx.config.errors import RequestError
from mlmx.config.labels import IGNORE_INDEX
from mlmx.data.chunks import document
from mlmx.data.masking import masker, token
from mlmx.data.tokens import tokenize
from mlmx.evaluation.bootstrap import Sums
from mlmx.evaluation.metrics import METRICS, try_out
from mlmx.evaluation.scoring import numbers, score
from mlmx.models.encoders import load_model, pretrained, scratch
from tests.support.plugins import MODULE, install


@pytest.fixture(scope="module")
def parts(tiny: Path, imdb, tokenizer):
    encoder = pretrained(path=str(tiny))
    loaded = load_model(encoder, tokenizer, seed=0)
    chunks = document(tokenize(imdb.select(range(30)), tokenizer), 64)
    mask = replace(masker(partial(token), tokenizer, 0.15, 42, (0.8, 0.1)), fixed=True)
    return loaded, chunks.select(np.arange(40)), mask


def scored(parts, batch_size: int) -> Sums:
    loaded, chunks, mask = parts
    return score(loaded, chunks, mask, batch_size)


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
    rows = np.arange(40)
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
    found = score(loaded, chunks.select(np.arange(8)), mask, 8)
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

    def without_the_first(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = mask(rows)
        empty = {**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
        return empty if rows[0]["sample"] == chunks[0]["sample"] else batch

    first, second, both = (chunks.select(np.array(rows)) for rows in ([0], [1], [0, 1]))
    assert score(loaded, first, without_the_first, 1) == Sums()
    assert score(loaded, both, without_the_first, 1) == score(loaded, second, mask, 1)


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


PLUGIN = """
from mlmx.evaluation.metrics import metric

@metric(higher_is_better=True)
def own_accuracy(logits, labels):
    return (logits.argmax(1) == labels).astype(np.float64)

@metric(higher_is_better=False)
def only_of_few(logits, labels):
    return logits[:, 0] if len(labels) < 10 else logits[0]
"""


def test_a_plugins_metric_gets_arrays_and_its_mean_is_reported_beside_ours(
    parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    install(tmp_path, PLUGIN, {"metric.own_accuracy": "own_accuracy"}, monkeypatch)
    for batch_size in (7, 40):
        found = numbers(scored(parts, batch_size))
        assert list(found) == ["loss", "perplexity", "accuracy", "own_accuracy"]
        assert found["own_accuracy"] == found["accuracy"]
    assert math.isnan(numbers(Sums())["own_accuracy"])


def test_what_a_plugins_metric_gives_is_checked_at_every_batch(parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(tmp_path, PLUGIN, {"metric.only_of_few": "only_of_few"}, monkeypatch)
    try_out()
    with pytest.raises(RequestError, match=rf"metric 'only_of_few' of {MODULE}: gives float32\[30522\]; float\[M\]"):
        scored(parts, 40)
