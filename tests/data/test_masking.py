"""Masking by its law: shares, specials, words, and masks that depend on (seed, epoch, sample) alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset

from mlmx.config.errors import RequestError
from mlmx.config.labels import IGNORE_INDEX
from mlmx.data import masking
from mlmx.data.chunks import Chunks, concat, document
from mlmx.data.masking import (
    MASKINGS,
    Masker,
    replacement_shares,
    require_budget,
    span,
    take_units,
    token,
    vocabulary,
    whole_word,
)
from mlmx.data.rng import bits_at, random_bits, random_halves, sample_keys, uniform, uniform32
from mlmx.data.tokens import tokenize

RATE = 0.15


@pytest.fixture(scope="module")
def chunks(imdb, tokenizer) -> Chunks:
    return concat(tokenize(imdb.select(range(1000)), tokenizer), 128)


def masker(tokenizer, strategy=token, rate: float = RATE, seed: int = 42, shares=(0.8, 0.1)) -> Masker:
    return masking.masker(partial(strategy), tokenizer, rate, seed, shares)


def masked(mask: Masker, chunks: Chunks, rows=range(800)) -> dict[str, torch.Tensor]:
    return mask([chunks[i] for i in rows])


STRATEGIES = [token, whole_word, span]


@pytest.fixture(scope="module")
def million(imdb, tokenizer) -> Chunks:
    """1,000,000 real tokens in chunks of 128."""
    chunks = concat(tokenize(imdb.select(range(3400)), tokenizer), 128)
    return chunks.select(np.arange(1_000_000 // 128))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_spends_the_same_budget_and_80_10_10(tokenizer, million: Chunks, strategy):
    rows = [million[i] for i in range(len(million))]
    original = torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()
    special = torch.from_numpy(vocabulary(tokenizer).special)
    for rate in (0.05, 0.15, 0.3, 0.45, 0.6):
        batch = masker(tokenizer, strategy, rate)(rows)
        targets = batch["labels"] != IGNORE_INDEX
        assert not (targets & special[original]).any()
        assert targets.any(dim=1).all()
        assert torch.equal(batch["labels"][targets], original[targets])
        assert torch.equal(batch["input_ids"][~targets], original[~targets])
        assert targets.sum() / (~special[original]).sum() == pytest.approx(rate, rel=0.01)
        shown = batch["input_ids"][targets]
        as_mask, kept = shown == tokenizer.mask_token_id, shown == original[targets]
        assert as_mask.float().mean() == pytest.approx(0.8, abs=0.01)
        assert kept.float().mean() == pytest.approx(0.1, abs=0.01)
        drawn = shown[~as_mask & ~kept]
        assert not special[drawn].any()
        assert len(drawn.unique()) > 0.1 * len(tokenizer), "random tokens come from the whole vocabulary"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_position_is_equally_likely(tokenizer, million: Chunks, strategy):
    """No strategy favours the beginning or the end of a chunk."""
    rows = [million[i] for i in range(len(million))]
    targets = (masker(tokenizer, strategy, 0.15)(rows)["labels"] != IGNORE_INDEX).numpy()
    ids = np.stack([row["input_ids"] for row in rows])
    candidates = ~vocabulary(tokenizer).special[ids]
    shares = targets.sum(axis=0) / candidates.sum(axis=0)
    eighths = shares.reshape(8, 16).mean(axis=1)
    assert eighths == pytest.approx(np.full(8, 0.15), rel=0.05)


def test_spans_are_longer_than_words_and_geometric(tokenizer, million: Chunks):
    rows = [million[i] for i in range(3000)]
    targets = (masker(tokenizer, span, 0.15)(rows)["labels"] != IGNORE_INDEX).numpy()
    starts = np.stack([row["word_starts"] for row in rows])
    words = np.array([run for line, words in zip(targets, starts, strict=True) for run in runs_of_words(line, words)])
    assert words.mean() == pytest.approx(4.2, abs=0.6)  # 1/p = 5, cut at 10 words and where the budget ends
    assert (words == 1).mean() == pytest.approx(0.2, abs=0.05)
    assert words.max() <= 25, "neighbouring spans may touch, but a span itself ends at 10 words"


def runs_of_words(targets: np.ndarray, word_starts: np.ndarray) -> list[int]:
    """Lengths in words of the runs of neighbouring targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], targets.astype(np.int8), [0]])))
    return [int(word_starts[a:b].sum()) for a, b in edges.reshape(-1, 2)]


def test_the_rate_moves_linearly_from_epoch_to_epoch(tokenizer, chunks: Chunks):
    mask = masking.masker(partial(token), tokenizer, 0.1, 42, final_probability=0.3, epochs=3)
    assert mask.rates == pytest.approx((0.1, 0.2, 0.3))
    for epoch, rate in ((0, 0.1), (1, 0.2), (2, 0.3), (9, 0.3)):
        labels = mask([{**chunks[i], "epoch": epoch} for i in range(400)])["labels"]
        assert (labels != IGNORE_INDEX).float().mean() == pytest.approx(rate, rel=0.03)
    fixed = replace(mask, fixed=True)([{**chunks[i], "epoch": 2} for i in range(400)])["labels"]
    assert (fixed != IGNORE_INDEX).float().mean() == pytest.approx(0.1, rel=0.03)


def test_shares_are_configurable(tokenizer, chunks: Chunks):
    batch = masked(
        masker(tokenizer, shares=replacement_shares(mask_share=1.0, random_share=0.0, keep_share=0.0)), chunks
    )
    targets = batch["labels"] != IGNORE_INDEX
    assert (batch["input_ids"][targets] == tokenizer.mask_token_id).all()
    with pytest.raises(RequestError, match=r"mask_share=0\.9.*together 1 \(they sum to 1\.2\)"):
        replacement_shares(mask_share=0.9, random_share=0.2, keep_share=0.1)


def test_a_budget_below_one_target_is_refused_with_the_smallest_that_works():
    with pytest.raises(RequestError, match=r"mlm_probability=0\.01.*the smallest that works is 0\.034") as refused:
        require_budget("mlm_probability", 0.01, 32)
    require_budget("mlm_probability", 0.034, 32)
    with pytest.raises(RequestError):
        require_budget("mlm_probability", 0.033, 32)
    assert "\n" not in str(refused.value)


def test_whole_words_are_masked_whole_and_punctuation_is_its_own_word(tokenizer):
    text = "Unbelievably, the schoolteachers' antidisestablishmentarianism. " * 8
    chunks = concat(tokenize(Dataset.from_dict({"text": [text]}), tokenizer), 64)
    row, words_masked = chunks[0], 0
    word = np.cumsum(row["word_starts"])
    assert len(set(word.tolist())) < len(word), "the text must hold words of several pieces"
    for seed in range(40):
        targets = (masker(tokenizer, whole_word, 0.3, seed)([row])["labels"][0] != IGNORE_INDEX).numpy()
        for number in set(word.tolist()):
            own = targets[word == number]
            assert own.all() or not own.any()
            words_masked += int(own.all())
    assert words_masked > 0
    full_stop = tokenizer.convert_tokens_to_ids(".")
    alone = [targets for seed in range(40) for targets in [stops_alone(tokenizer, row, full_stop, seed)]]
    assert any(alone), "a full stop is chosen without the word before it at least once"


def stops_alone(tokenizer, row: dict, full_stop: int, seed: int) -> bool:
    labels = masker(tokenizer, whole_word, 0.3, seed)([row])["labels"][0].numpy()
    stops = np.flatnonzero(row["input_ids"] == full_stop)
    return any(labels[i] != IGNORE_INDEX and labels[i - 1] == IGNORE_INDEX for i in stops)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_sample_has_a_target(tokenizer, chunks: Chunks, strategy):
    short = [{**chunks[i], **{k: chunks[i][k][:8] for k in ("input_ids", "word_starts")}} for i in range(200)]
    labels = masker(tokenizer, strategy, 0.01)(short)["labels"]
    assert (labels != IGNORE_INDEX).any(dim=1).all()


def test_a_mask_depends_on_seed_epoch_and_sample_alone(tokenizer, chunks: Chunks):
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
    chunks = document(tokenize(texts, tokenizer), 32)
    mask = masker(tokenizer, rate=0.5)
    both, alone = mask([chunks[0], chunks[1]]), mask([chunks[0]])
    length = alone["labels"].shape[1]
    assert torch.equal(both["labels"][0, :length], alone["labels"][0])
    assert (both["labels"][0, length:] == IGNORE_INDEX).all()
    assert both["attention_mask"].sum(1).tolist() == [length, len(chunks[1]["input_ids"])]
    assert (both["input_ids"][0, length:] == tokenizer.pad_token_id).all()


def test_full_rows_carry_no_attention_mask(tokenizer, chunks: Chunks):
    assert "attention_mask" not in masked(masker(tokenizer), chunks, range(4))


def test_evaluation_masks_are_fixed_over_epochs_and_not_those_of_training(tokenizer, chunks: Chunks):
    fixed = replace(masker(tokenizer), fixed=True)
    first, later = fixed([chunks[0]]), fixed([{**chunks[0], "epoch": 5}])
    assert torch.equal(first["labels"], later["labels"])
    assert not torch.equal(first["labels"], masker(tokenizer)([chunks[0]])["labels"])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("chunking", [concat, document])
def test_rows_taken_together_are_masked_as_one_by_one(imdb, tokenizer, chunking, strategy):
    tokens = tokenize(imdb.select(range(100)), tokenizer)
    rows = np.random.default_rng(0).permutation(120).tolist()
    for known in (tokens, replace(tokens, word_starts=None)):
        chunks = replace(chunking(known, 128), epoch=2)
        mask = masker(tokenizer, strategy)
        together, one_by_one = mask(chunks.__getitems__(rows)), masked(mask, chunks, rows)
        assert together.keys() == one_by_one.keys()
        assert all(torch.equal(together[name], one_by_one[name]) for name in together)


def test_rows_of_one_length_come_stacked_and_others_one_by_one(tokenizer, chunks: Chunks):
    stacked = chunks.__getitems__([3, 0, len(chunks) - 1])
    for place, number in enumerate([3, 0, len(chunks) - 1]):
        assert all(np.array_equal(stacked[name][place], chunks[number][name]) for name in chunks[number])
    ragged = replace(chunks, lengths=np.where(np.arange(len(chunks)) == 0, 5, chunks.lengths))
    assert [len(row["input_ids"]) for row in ragged.__getitems__([0, 1])] == [5, 128]
    assert isinstance(ragged.__getitems__([1, 2]), dict)


@pytest.mark.parametrize("values", [2**32, 64])
def test_the_budget_is_exact_in_expectation_for_units_of_all_sizes_and_for_equal_draws(values: int):
    rows, sizes = 20_000, [1, 2, 3, 1, 5, 4, 1, 7, 2, 6, 1, 3, 4]
    unit_starts = np.zeros((rows, sum(sizes)), np.bool_)
    unit_starts[:, np.cumsum([0, *sizes[:-1]])] = True
    candidates = np.ones_like(unit_starts)
    candidates[:, ::9] = False
    random = np.random.default_rng(0)
    draws = random.integers(0, values, candidates.shape, np.uint32) * np.uint32(2**32 // values)
    for budget in (9.0, 12.3, 20.9):
        budgets, coins = np.full((rows, 1), budget), random.random((rows, 1))
        targets = take_units(unit_starts, candidates, budgets, draws, coins)
        assert not (targets & ~candidates).any()
        found = targets.sum(axis=1)
        assert found.mean() == pytest.approx(budget, abs=4 * found.std() / np.sqrt(rows) + 1e-9)


def test_the_largest_draw_is_as_good_as_any():
    draws = np.full((2, 4), 2**32 - 1, np.uint32)
    candidates = np.array([[False, True, False, False], [False] * 4])
    targets = take_units(np.ones_like(candidates), candidates, np.full((2, 1), 0.1), draws, np.ones((2, 1)))
    assert np.array_equal(targets, candidates)


@pytest.mark.parametrize("name", sorted(set(MASKINGS) - {"span"}))
def test_strategies_that_are_given_no_uniforms_need_none(tokenizer, chunks: Chunks, name: str):
    mask = masker(tokenizer, MASKINGS[name])
    assert not mask.draws_units, "drawing takes time"
    drawn = masked(replace(mask, draws_units=True), chunks, range(32))
    assert torch.equal(drawn["labels"], masked(mask, chunks, range(32))["labels"])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_worker_processes_change_no_mask(tokenizer, chunks: Chunks, workers: int):
    some = chunks.select(np.arange(32))
    loader = torch.utils.data.DataLoader(
        some, batch_size=5, collate_fn=masker(tokenizer), num_workers=workers, multiprocessing_context=None
    )
    labels = torch.cat([batch["labels"] for batch in loader])
    assert torch.equal(labels, masked(masker(tokenizer), chunks, range(32))["labels"])


# --------------------------------------------------------------- words, for three kinds of tokenizer

SENTENCE = "the unbelievable movie. they're here, again!"
WORDS = ["the", "unbelievable", "movie", ".", "they", "'", "re", "here", ",", "again", "!"]


def word_piece():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIALS)


def byte_level_bpe():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS)


def unigram():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made, trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIALS, unk_token="<unk>")


SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]


@pytest.mark.parametrize("kind", [word_piece, byte_level_bpe, unigram])
def test_words_are_whole_and_signs_are_words_for(kind, imdb):
    from transformers import PreTrainedTokenizerFast

    made, trainer = kind()
    made.train_from_iterator([*imdb.select(range(60))["text"], SENTENCE * 5], trainer)
    names = {
        "unk_token": "<unk>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    own = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    tokens = tokenize(Dataset.from_dict({"text": [SENTENCE]}), own)
    assert tokens.word_starts is not None
    pieces = own.convert_ids_to_tokens(tokens.ids.tolist())
    words: list[str] = []
    for piece, starts in zip(pieces, tokens.word_starts, strict=True):
        plain = piece.replace("##", "").replace("Ġ", "").replace("▁", "")
        words[-1:] = (
            [plain] if starts and words[-1:] == [""] else [*words[-1:], plain] if starts else [words[-1] + plain]
        )
    assert len(words) < len(pieces), "the sentence must hold words of several pieces"
    contracted = [word for word in words if word in ("'re", "they're")]
    if contracted:  # byte-level BPE keeps the contraction's apostrophe with its letters
        words = [part for word in words for part in (["'", "re"] if word == "'re" else [word])]
    assert words == WORDS
    row = concat(tokens, len(tokens.ids))[0]
    number = np.cumsum(row["word_starts"])
    for seed in range(30):
        labels = masking.masker(partial(whole_word), own, 0.3, seed)([row])["labels"][0].numpy()
        for word in np.unique(number):
            chosen = labels[number == word] != IGNORE_INDEX
            assert chosen.all() or not chosen.any()


@pytest.mark.parametrize(
    "draw", [lambda keys: uniform(random_bits(keys, 500)), lambda keys: uniform32(random_halves(keys, 500))]
)
def test_uniforms_are_uniform_and_rows_independent(draw):
    keys = sample_keys(7, np.zeros(200), np.arange(200))
    uniforms = draw(keys)
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    counts = np.histogram(uniforms, bins=20, range=(0, 1))[0]
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < 43.8  # 0.1 % of χ²(19)
    assert abs(np.corrcoef(uniforms[:-1].ravel(), uniforms[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(uniforms[:, :-1].ravel(), uniforms[:, 1:].ravel())[0, 1]) < 0.01
    assert len(np.unique(keys)) == 200


def test_a_number_needs_none_before_it():
    keys = sample_keys(7, np.zeros(3), np.arange(3))
    bits = random_bits(keys, 50, stream=2)
    assert np.array_equal(bits_at(keys[[2, 0]], np.array([9, 49]), stream=2), bits[[2, 0], [9, 49]])
    assert np.array_equal(random_bits(keys, 40, stream=2, first=np.full(3, 10, np.uint64)), bits[:, 10:])
    for length in (1, 20, 51):
        assert np.array_equal(random_halves(keys, length), random_halves(keys, 99)[:, :length])


def test_seeds_streams_and_epochs_give_different_keys():
    samples = np.arange(50)
    parts = [(s, e, t) for s in (0, 1, 42) for e in (0, 1, 2) for t in (0, 1)]
    keys = [sample_keys(s, np.full(50, e), samples, t) for s, e, t in parts]
    assert len(np.unique(np.concatenate(keys))) == 50 * len(parts)
