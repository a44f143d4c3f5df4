"""The yardstick: the same targets whatever a run's dials, additive scores, comparable across tokenizers."""

from __future__ import annotations

import collections
import hashlib
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from mlmx.config.errors import RequestError
from mlmx.config.labels import IGNORE_INDEX
from mlmx.data import hashing, heldout
from mlmx.data.chunks import concat, document
from mlmx.data.heldout import BANDS, PIECES, HeldoutChunks, heldout_chunks, split_off, token_groups
from mlmx.data.masking import Vocabulary, vocabulary
from mlmx.data.protocol import RATE, WholeWords, Yardstick
from mlmx.data.tokens import tokenize
from mlmx.evaluation.bootstrap import DocumentSums, resampled
from mlmx.evaluation.scoring import bits_per_byte, numbers, score_documents
from mlmx.models.encoders import load_model, scratch

CHUNK_SIZES = (64, 128, 256, 512)


@pytest.fixture(scope="module")
def texts(imdb) -> Dataset:
    return heldout.choose(imdb, 16)


@pytest.fixture(scope="module")
def scored_model(tokenizer):
    return load_model(scratch(layers=1, hidden_size=32, heads=2, dropout=0.3), tokenizer, seed=1)


def targets(rows: HeldoutChunks, collate, batch_size: int) -> list[tuple[int, int, int, int]]:
    """(document, position in it, shown id, right id) of every target, in no particular order."""
    found = []
    for first in range(0, len(rows), batch_size):
        some = [rows[i] for i in range(first, min(first + batch_size, len(rows)))]
        batch = collate(some)
        for row, column in zip(*np.nonzero((batch["labels"] != IGNORE_INDEX).numpy()), strict=True):
            place = some[row]["position"] + column - some[row]["num_prefix"]
            shown, right = int(batch["input_ids"][row, column]), int(batch["labels"][row, column])
            found.append((int(some[row]["document"]), int(place), shown, right))
    return found


def test_every_chunk_size_and_batch_size_scores_the_same_targets_once(texts: Dataset, tokenizer):
    collate = Yardstick(vocabulary(tokenizer))
    expected = targets(heldout_chunks(texts, tokenizer, 64), collate, 7)
    assert len(expected) == len(set(expected)), "each exactly once"
    for chunk_size in CHUNK_SIZES:
        rows = heldout_chunks(texts, tokenizer, chunk_size)
        for batch_size in (1, 7, 64):
            assert sorted(targets(rows, collate, batch_size)) == sorted(expected)
    own = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts["text"])
    assert len(expected) / own == pytest.approx(RATE, rel=0.1)
    shown = [(s, r) for _, _, s, r in expected]
    assert sum(s == tokenizer.mask_token_id for s, _ in shown) / len(shown) == pytest.approx(0.8, abs=0.05)
    assert sum(s == r for s, r in shown) / len(shown) == pytest.approx(0.1, abs=0.05)


def test_nothing_of_a_document_is_dropped(texts: Dataset, tokenizer):
    for chunk_size in CHUNK_SIZES:
        rows = heldout_chunks(texts, tokenizer, chunk_size)
        by_document: dict[int, list[tuple[int, list[int]]]] = {}
        for row in (rows[i] for i in range(len(rows))):
            by_document.setdefault(int(row["document"]), []).append(
                (row["position"], row["input_ids"][row["num_prefix"] : -row["num_suffix"]].tolist())
            )
        keys = hashing.document_keys(texts)
        for key, text in zip(keys, texts["text"], strict=True):
            pieces = [token for _, piece in sorted(by_document[int(key)]) for token in piece]
            assert pieces == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("workers", [0, 2])
def test_score_is_the_same_for_batch_sizes_and_workers_and_repeats_to_the_bit(
    texts: Dataset, tokenizer, scored_model, workers: int
):
    collate, rows = Yardstick(vocabulary(tokenizer)), heldout_chunks(texts, tokenizer, 64)
    loader = torch.utils.data.DataLoader(rows, batch_size=7, collate_fn=collate, num_workers=workers)
    direct = [collate([rows[i] for i in range(first, min(first + 7, len(rows)))]) for first in range(0, len(rows), 7)]
    for through_loader, batch in zip(loader, direct, strict=True):
        assert all(torch.equal(through_loader[name], batch[name]) for name in batch)
    scores = [score_documents(scored_model, rows, collate, size) for size in (1, 7, 64)]
    for other in scores[1:]:
        assert numbers(other.sums())["loss"] == pytest.approx(numbers(scores[0].sums())["loss"], rel=1e-6)
        assert np.array_equal(other.tokens, scores[0].tokens)
    again = score_documents(scored_model, rows, collate, 7)
    assert np.array_equal(again.totals["loss"], scores[1].totals["loss"])


def test_the_masks_are_those_of_every_run_before():
    """A protocol id promises the same targets, shown the same: they may not change with the code."""
    special = np.arange(1000) < 5
    known = Vocabulary(special, np.flatnonzero(~special).astype(np.int32), mask_id=4, pad_id=0)
    ids = (np.arange(6 * 300) * 7919 % 1000).astype(np.int32).reshape(6, 300)
    affixes = {"num_prefix": 1, "num_suffix": 1}
    rows = [
        {"input_ids": ids[i, : 300 - 40 * i], "word_starts": None, "document": np.uint64(i), "position": 298 * i}
        | affixes
        for i in range(6)
    ]
    batch = Yardstick(known)(rows)
    found = hashlib.sha256(batch["input_ids"].numpy().tobytes() + batch["labels"].numpy().tobytes()).hexdigest()
    assert found[:16] == "b232cf7cf6e980c6"


def test_rows_reach_the_yardstick_one_by_one_also_without_special_tokens(texts: Dataset, tokenizer):
    rows = heldout_chunks(texts, tokenizer, 64)
    bare = replace(rows, prefix=rows.prefix[:0], suffix=rows.suffix[:0])
    assert [row["position"] for row in bare.__getitems__([0, 1])] == [bare[i]["position"] for i in (0, 1)]


def test_context_is_all_that_a_chunk_size_changes(texts: Dataset, tokenizer, scored_model, record_property):
    """Same targets, more or less context: reported, and for an untrained model without effect worth the name."""
    collate, losses = Yardstick(vocabulary(tokenizer)), {}
    for chunk_size in CHUNK_SIZES:
        rows = heldout_chunks(texts, tokenizer, chunk_size)
        losses[chunk_size] = numbers(score_documents(scored_model, rows, collate, 16).sums())["loss"]
        record_property(f"loss_at_{chunk_size}", losses[chunk_size])
    assert len(set(losses.values())) == len(CHUNK_SIZES)
    assert max(losses.values()) - min(losses.values()) < 0.02


def test_documents_are_chosen_by_content_not_by_place(imdb):
    some = imdb.select(range(200))
    backwards = some.select(range(199, -1, -1))
    chosen = heldout.choose(some, 20)["text"]
    assert sorted(chosen) == sorted(heldout.choose(backwards, 20)["text"])
    assert list(chosen) != list(some.select(range(20))["text"])


def test_a_held_out_share_is_disjoint_and_takes_every_copy():
    texts = Dataset.from_dict({"text": [f"document number {i % 90}" for i in range(100)]})
    split = split_off(texts, None, "nowhere", 50, 0.2, allow_overlap=False)
    train, held = split.train, split.heldout
    assert len(held) == 18
    assert not set(train["text"]) & set(held["text"])
    assert set(train["text"]) | set(held["text"]) == set(texts["text"])


def test_overlap_is_counted_quoted_and_refused():
    training = Dataset.from_dict({"text": ["one", "two", "three"]})
    other = Dataset.from_dict({"text": ["two", "three", "four"]})
    with pytest.raises(RequestError, match=r"2 of its 3 documents.*'two'.*allow_overlap=true"):
        split_off(training, other, "heldout.dataset=x", 10, 0.1, allow_overlap=False)
    split = split_off(training, other, "heldout.dataset=x", 10, 0.1, allow_overlap=True)
    assert (split.heldout["text"][:], split.left_out) == (["four"], 2)


# ------------------------------------------------------------------------------ bits per byte


@pytest.fixture(scope="module")
def bpe(imdb, tmp_path_factory: pytest.TempPathFactory):
    """A small byte-level BPE tokenizer trained on real reviews: other pieces than WordPiece, cased."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(imdb.select(range(100))["text"], trainer)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, mask_token="<mask>", **names)


def test_two_tokenizers_score_the_same_bytes(texts: Dataset, tokenizer, bpe):
    one, other = (heldout_chunks(texts, t, 64) for t in (tokenizer, bpe))
    assert one.word_bytes.tolist() == other.word_bytes.tolist()
    assert one.word_bytes.sum() > 0
    for number, text in enumerate(texts["text"]):
        scored = [scored_characters(rows, t, number, text) for rows, t in ((one, tokenizer), (other, bpe))]
        assert scored[0] == scored[1]
        assert sum(len(text[i].encode()) for i in scored[0]) == one.word_bytes[number]


def scored_characters(rows: HeldoutChunks, tokenizer, number: int, text: str) -> set[int]:
    """Positions of the characters under the chosen tokens of a document."""
    first, last = rows.tokens.offsets[number : number + 2]
    offsets = tokenizer.backend_tokenizer.encode(text).offsets
    return {place for i in np.flatnonzero(rows.chosen[first:last]) for place in range(*offsets[i])}


def test_bits_per_byte_is_bits_over_bytes(texts: Dataset, tokenizer, scored_model):
    rows = heldout_chunks(texts, tokenizer, 128)
    words = score_documents(scored_model, rows, WholeWords(vocabulary(tokenizer)), 8)
    found = bits_per_byte(words, rows.word_bytes)
    assert found == pytest.approx(words.totals["loss"].sum() / math.log(2) / rows.word_bytes.sum())
    uniform = int(words.tokens.sum()) * math.log2(len(tokenizer)) / rows.word_bytes.sum()
    assert found == pytest.approx(uniform, rel=0.02), "an untrained model guesses among the whole vocabulary"


def test_chosen_words_are_masked_whole(texts: Dataset, tokenizer):
    rows = heldout_chunks(texts, tokenizer, 512)
    starts, chosen = rows.tokens.word_starts, rows.chosen
    assert starts is not None
    inside = ~starts[1:]
    assert (chosen[1:] == chosen[:-1])[inside].all()


# --------------------------------------------------------------------------------- uncertainty


def sums_of(losses: np.ndarray, tokens: np.ndarray) -> DocumentSums:
    return DocumentSums(np.arange(len(tokens), dtype=np.uint64), tokens, {"loss": losses * tokens})


def test_paired_difference_finds_a_difference_that_single_scores_hide():
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 60, 400)
    hard = rng.normal(3.0, 1.0, 400)
    one, other = sums_of(hard + 0.05 + rng.normal(0, 0.1, 400), tokens), sums_of(hard, tokens)
    found = resampled([one, other]).difference(0, 1)
    assert found.low < found.mean < found.high
    assert found.low > 0, "the interval excludes no difference"
    assert found.mean == pytest.approx(0.05, abs=0.02)
    back = resampled([other, one]).difference(0, 1)
    assert (back.mean, back.low, back.high) == pytest.approx((-found.mean, -found.high, -found.low))


def test_the_interval_covers_at_its_level():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        tokens = rng.integers(20, 60, 100)
        noise = rng.normal(0.02, 0.3, 100)
        pair = sums_of(3 + noise, tokens), sums_of(np.full(100, 3.0), tokens)
        found = resampled(pair, draws=400).difference(0, 1)
        covered += found.low <= 0.02 <= found.high
    assert 0.89 <= covered / 200 <= 0.99


def test_only_the_same_targets_can_be_compared():
    tokens = np.array([5, 6])
    with pytest.raises(RequestError, match="did not score the same held-out targets"):
        resampled([sums_of(np.ones(2), tokens), sums_of(np.ones(2), tokens + 1)])


@pytest.mark.parametrize("number", [2, 9, 12])
def test_equal_runs_are_never_told_apart_wherever_they_stand(number: int):
    """A product of matrices may round a column by its place, so that every draw finds the same tiny difference."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 9, 30)
    first, *others = (sums_of(rng.normal(3, 1, 30), tokens) for _ in range(number))
    for place in range(number - 1):
        together = resampled([first, *others[:place], first, *others[place + 1 :]])
        found = together.difference(0, place + 1)
        assert (found.mean, found.low, found.high) == (0, 0, 0), place


def test_pairs_drawn_together_are_the_pairs_drawn_alone_whatever_fits_into_memory(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, 9, 30)
    runs = [sums_of(rng.normal(3, 1, 30), tokens) for _ in range(3)]
    together = resampled(runs)
    for one, other in itertools.combinations(range(3), 2):
        assert together.difference(one, other) == resampled([runs[one], runs[other]]).difference(0, 1)
    monkeypatch.setattr("mlmx.evaluation.bootstrap.MOST_AT_ONCE", 100)
    assert np.allclose(resampled(runs).samples, together.samples, rtol=1e-13, atol=0)
    low, high = together.interval(0)
    assert low < together.means[0] < high
    assert not together.difference(1, 1).is_told_apart


def test_document_sums_are_kept_without_pickle(tmp_path: Path):
    made = sums_of(np.array([1.5, 2.5]), np.array([3, 4]))
    made.save(tmp_path / "heldout.npz")
    back = DocumentSums.load(tmp_path / "heldout.npz")
    assert np.array_equal(back.keys, made.keys)
    assert np.array_equal(back.tokens, made.tokens)
    assert np.array_equal(back.totals["loss"], made.totals["loss"])


# ---------------------------------------------------------------------------------- break-down


def test_groups_by_word_frequency_and_piece(tokenizer):
    training = tokenize(Dataset.from_dict({"text": ["the movie " * 1200, "unbelievably odd " * 3]}), tokenizer)
    held = tokenize(Dataset.from_dict({"text": ["the unbelievably new"]}), tokenizer)
    groups = token_groups(held, document(training, 4000))
    named = [(list(BANDS)[g // 2], PIECES[g % 2]) for g in groups.tolist()]
    pieces = tokenizer.convert_ids_to_tokens(held.ids.tolist())
    told = dict(zip(pieces, named, strict=True))
    assert told["the"] == ("common", "first")
    assert told["new"] == ("unseen", "first")
    assert told["un"] == ("rare", "first")
    assert all(told[piece] == ("rare", "continuation") for piece in pieces if piece.startswith("##"))


def test_bands_count_whole_words_in_the_rows_trained_on(imdb, tokenizer):
    tokens, held = (tokenize(imdb.select(rows), tokenizer) for rows in (range(100), range(100, 120)))
    assert tokens.word_starts is not None
    training = concat(tokens, 64).select(np.arange(0, 300, 3))
    flat = [int(i) for row in (training[n] for n in range(len(training))) for i in row["input_ids"]]
    starts = np.concatenate([training[n]["word_starts"] for n in range(len(training))])
    counts = collections.Counter(words_of(flat, starts))
    expected = []
    for word in words_of(held.ids.tolist(), held.word_starts):
        band = sum(counts[word] >= least for least in BANDS.values()) - 1
        expected += [2 * band + (piece > 0) for piece in range(len(word))]
    assert token_groups(held, training).tolist() == expected
    assert len(set(expected)) >= 5


def words_of(ids: list[int], starts: np.ndarray) -> list[tuple[int, ...]]:
    """Pieces word by word; the first token begins a word, wherever the row was cut."""
    edges = sorted({0, *np.flatnonzero(starts).tolist(), len(ids)})
    return [tuple(ids[a:b]) for a, b in itertools.pairwise(edges)]
