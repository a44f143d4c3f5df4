"""Masking by its law: shares, specials, words, and masks that depend on (seed, epoch, sample) alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset

from mlmx import data, masking
from mlmx.config import RequestError

RATE = 0.15


@pytest.fixture(scope="module")
def chunks(imdb, tokenizer) -> data.Chunks:
    return data.concat(data.tokenize(imdb.select(range(1000)), tokenizer), 128)


def masker(tokenizer, strategy=masking.token, rate: float = RATE, seed: int = 42, shares=(0.8, 0.1)) -> masking.Masker:
    return masking.masker(partial(strategy), tokenizer, rate, seed, shares)


def masked(mask: masking.Masker, chunks: data.Chunks, rows=range(800)) -> dict[str, torch.Tensor]:
    return mask([chunks[i] for i in rows])


@pytest.mark.parametrize("strategy", [masking.token, masking.whole_word])
@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_share_of_targets_and_80_10_10(tokenizer, chunks: data.Chunks, strategy, rate: float):
    batch = masked(masker(tokenizer, strategy, rate), chunks)
    original = torch.from_numpy(np.stack([chunks[i]["input_ids"] for i in range(800)])).long()
    targets = batch["labels"] != masking.IGNORED
    special = torch.from_numpy(masking.vocabulary(tokenizer).special)[original]
    assert not (targets & special).any()
    assert torch.equal(batch["labels"][targets], original[targets])
    assert torch.equal(batch["input_ids"][~targets], original[~targets])
    assert targets.sum() / (~special).sum() == pytest.approx(rate, rel=0.02)
    shown = batch["input_ids"][targets]
    as_mask = (shown == tokenizer.mask_token_id).float().mean()
    kept = (shown == original[targets]).float().mean()
    assert as_mask == pytest.approx(0.8, abs=0.01)
    assert kept == pytest.approx(0.1, abs=0.01)
    drawn = shown[(shown != tokenizer.mask_token_id) & (shown != original[targets])]
    assert not torch.from_numpy(masking.vocabulary(tokenizer).special)[drawn].any()
    assert len(drawn.unique()) > 0.5 * min(len(drawn), len(tokenizer)), "random tokens come from the whole vocabulary"


def test_shares_are_configurable(tokenizer, chunks: data.Chunks):
    batch = masked(masker(tokenizer, shares=masking.replacement_shares(mask_share=1.0, random_share=0.0)), chunks)
    targets = batch["labels"] != masking.IGNORED
    assert (batch["input_ids"][targets] == tokenizer.mask_token_id).all()
    with pytest.raises(RequestError, match=r"mask_share=0\.9 and masking\.random_share=0\.2"):
        masking.replacement_shares(mask_share=0.9, random_share=0.2)


def test_whole_words_are_masked_whole_and_punctuation_is_its_own_word(tokenizer):
    text = "Unbelievably, the schoolteachers' antidisestablishmentarianism. " * 8
    chunks = data.concat(data.tokenize(Dataset.from_dict({"text": [text]}), tokenizer), 64)
    row, words_masked = chunks[0], 0
    word = np.cumsum(row["word_starts"])
    assert len(set(word.tolist())) < len(word), "the text must hold words of several pieces"
    for seed in range(40):
        targets = (masker(tokenizer, masking.whole_word, 0.3, seed)([row])["labels"][0] != masking.IGNORED).numpy()
        for number in set(word.tolist()):
            own = targets[word == number]
            assert own.all() or not own.any()
            words_masked += int(own.all())
    assert words_masked > 0
    full_stop = tokenizer.convert_tokens_to_ids(".")
    alone = [targets for seed in range(40) for targets in [stops_alone(tokenizer, row, full_stop, seed)]]
    assert any(alone), "a full stop is chosen without the word before it at least once"


def stops_alone(tokenizer, row: dict, full_stop: int, seed: int) -> bool:
    labels = masker(tokenizer, masking.whole_word, 0.3, seed)([row])["labels"][0].numpy()
    stops = np.flatnonzero(row["input_ids"] == full_stop)
    return any(labels[i] != masking.IGNORED and labels[i - 1] == masking.IGNORED for i in stops)


@pytest.mark.parametrize("strategy", [masking.token, masking.whole_word])
def test_every_sample_has_a_target(tokenizer, chunks: data.Chunks, strategy):
    short = [{**chunks[i], **{k: chunks[i][k][:8] for k in ("input_ids", "word_starts")}} for i in range(200)]
    labels = masker(tokenizer, strategy, 0.01)(short)["labels"]
    assert (labels != masking.IGNORED).any(dim=1).all()


def test_a_mask_depends_on_seed_epoch_and_sample_alone(tokenizer, chunks: data.Chunks):
    mask = masker(tokenizer)
    together = masked(mask, chunks, range(8))
    for row in range(8):
        alone = mask([chunks[row]])
        for name in ("input_ids", "labels"):
            assert torch.equal(alone[name][0], together[name][row])
    backwards = masked(mask, chunks, range(7, -1, -1))
    assert torch.equal(backwards["labels"].flip(0), together["labels"])
    assert not torch.equal(masked(masker(tokenizer, seed=43), chunks, range(8))["labels"], together["labels"])
    later = mask([{**chunks[row], "epoch": 1} for row in range(8)])
    assert not torch.equal(later["labels"], together["labels"])


def test_a_mask_does_not_depend_on_the_rows_it_is_padded_with(tokenizer):
    texts = Dataset.from_dict({"text": ["a short one, unbelievably", "a much longer text that fills the row " * 3]})
    chunks = data.document(data.tokenize(texts, tokenizer), 32)
    mask = masker(tokenizer, rate=0.5)
    both, alone = mask([chunks[0], chunks[1]]), mask([chunks[0]])
    length = alone["labels"].shape[1]
    assert torch.equal(both["labels"][0, :length], alone["labels"][0])
    assert (both["labels"][0, length:] == masking.IGNORED).all()
    assert both["attention_mask"].sum(1).tolist() == [length, len(chunks[1]["input_ids"])]
    assert (both["input_ids"][0, length:] == tokenizer.pad_token_id).all()


def test_full_rows_carry_no_attention_mask(tokenizer, chunks: data.Chunks):
    assert "attention_mask" not in masked(masker(tokenizer), chunks, range(4))


def test_evaluation_masks_are_fixed_over_epochs_and_not_those_of_training(tokenizer, chunks: data.Chunks):
    fixed = replace(masker(tokenizer), fixed=True)
    first, later = fixed([chunks[0]]), fixed([{**chunks[0], "epoch": 5}])
    assert torch.equal(first["labels"], later["labels"])
    assert not torch.equal(first["labels"], masker(tokenizer)([chunks[0]])["labels"])


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_change_no_mask(tokenizer, chunks: data.Chunks, workers: int):
    some = chunks.select(np.arange(32))
    loader = torch.utils.data.DataLoader(
        some, batch_size=5, collate_fn=masker(tokenizer), num_workers=workers, multiprocessing_context=None
    )
    labels = torch.cat([batch["labels"] for batch in loader])
    assert torch.equal(labels, masked(masker(tokenizer), chunks, range(32))["labels"])


def test_uniforms_are_uniform_and_rows_independent():
    keys = masking.sample_keys(7, np.zeros(200), np.arange(200))
    uniforms = masking._uniform(masking.random_bits(keys, 500))
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    counts = np.histogram(uniforms, bins=20, range=(0, 1))[0]
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < 43.8  # 0.1 % of χ²(19)
    assert abs(np.corrcoef(uniforms[:-1].ravel(), uniforms[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(uniforms[:, :-1].ravel(), uniforms[:, 1:].ravel())[0, 1]) < 0.01
    assert len(np.unique(keys)) == 200


def test_seeds_streams_and_epochs_give_different_keys():
    samples = np.arange(50)
    parts = [(s, e, t) for s in (0, 1, 42) for e in (0, 1, 2) for t in (0, 1)]
    keys = [masking.sample_keys(s, np.full(50, e), samples, t) for s, e, t in parts]
    assert len(np.unique(np.concatenate(keys))) == 50 * len(parts)
