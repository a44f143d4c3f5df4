"""Tokens and chunks: no token lost or invented, and the published recipe's rows to the bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from tokenizers import Tokenizer, models, pre_tokenizers

from mlmx.config.errors import RequestError
from mlmx.data.chunks import DOCUMENTS_PER_GROUP, Chunks, concat, document, rows_sha256, split_chunks
from mlmx.data.fast import ODD_TEXTS
from mlmx.data.hashing import batches, content_sha256, document_keys, utf8
from mlmx.data.tokens import Tokens, _with_word_ids, tokenize, word_begins

# The recipe's own tokenise, group and split code run on the 25,000 IMDB train reviews (chunks, all, train, test).
REFERENCE = {
    128: (
        61291,
        "52fae8faf907f8aebbb36b8a1aa68808a03053e40825960f7c50edb98eb36158",
        "e5539b0e53645166e0a501a78ac0f83597228ae5295d075a25e21602c305188e",
        "d138500c9525bd53dcb914b5a8999de965450f069335571083299f748529c4aa",
        [2060, 2084, 4438, 3185, 23176, 2015, 1011, 2113, 2505, 2055, 2009, 1012],
    ),
    256: (
        30639,
        "5b9e1ea4009309c7e857427ef9125e4beab6c030284e57ab834dc5c70e1ff29f",
        "d47b39373fb26ea8f0f4586eebfa5bbe04b827e08cbffb6000b06b6936b82cc9",
        "6bb50b105a9655e27abeb05e112ae3f5b391358876c4969bcd9fb369944486f5",
        [1055, 3701, 2138, 2750, 1037, 2025, 1011, 2061, 1011, 2047, 2466, 2009],
    ),
    512: (
        15313,
        "68a21a003ee3833b36306cd49c7c321a0b229b3a6eb5e8eb4bd837814ff22829",
        "6e8d6e4a27e811d04e1217740bab1d8df79994cdb757c6a48445b68f94a2db3f",
        "0bd7e88eb5ac10863f92d037f4573f041640a062add5c04cc3844bd92a27bd9f",
        [14045, 2839, 1997, 17982, 5302, 3527, 1013, 8040, 3217, 23884, 1012, 9303],
    ),
}


@pytest.fixture(scope="session")
def imdb_tokens(imdb, tokenizer) -> Tokens:
    return tokenize(imdb, tokenizer)


def test_imdb_has_the_recipes_number_of_tokens(imdb_tokens: Tokens):
    assert len(imdb_tokens.ids) == 7_846_783
    assert len(imdb_tokens.offsets) - 1 == 25_000


@pytest.mark.parametrize("chunk_size", REFERENCE)
def test_imdb_chunks_and_split_are_the_recipes(imdb_tokens: Tokens, chunk_size: int):
    count, everything, training, evaluation, first_ids = REFERENCE[chunk_size]
    chunks = concat(imdb_tokens, chunk_size)
    train, held = split_chunks(chunks)
    assert (len(chunks), len(train), len(held)) == (count, 10_000, 1_000)
    assert rows_sha256(chunks) == everything
    assert rows_sha256(train) == training
    assert rows_sha256(held) == evaluation
    assert train[0]["input_ids"][:12].tolist() == first_ids


def test_texts_are_hashed_by_content_however_they_lie_in_memory():
    texts = ["émigré 😀", "", "one", "two " * 900]
    plain = Dataset.from_dict({"text": texts})
    keys = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") for text in texts]
    joined = concatenate_datasets([plain.select([0, 1]), Dataset.from_dict({"text": texts[2:]})])
    chosen = Dataset.from_dict({"text": [*texts[::-1], "more"]}).select([3, 2, 1, 0])
    for same in (plain, joined, chosen, Dataset.from_dict({"text": ["more", *texts]}).select(range(1, 5))):
        assert document_keys(same).tolist() == keys
        assert content_sha256(same) == content_sha256(plain)
        assert b"".join(bytes(utf8(batch)[1]) for batch in batches(same)).decode() == "".join(texts)
    assert content_sha256(Dataset.from_dict({"text": ["émigré 😀o", "", "ne", texts[3]]})) != content_sha256(plain)


TEXTS = ["I rented it.", "Great movie, unbelievably so!", "", "émigré 😀 [MASK] don't"]


@pytest.fixture(scope="module")
def tokens(tokenizer) -> Tokens:
    return tokenize(Dataset.from_dict({"text": TEXTS}), tokenizer)


def test_tokens_are_each_documents_own_encoding(tokens: Tokens, tokenizer):
    for number, text in enumerate(TEXTS):
        own = tokens.ids[tokens.offsets[number] : tokens.offsets[number + 1]]
        assert own.tolist() == tokenizer(text)["input_ids"]


def test_a_tokenizer_files_truncation_and_padding_are_switched_off(tokenizer):
    long = " ".join(["word"] * 700)
    assert len(tokenize(Dataset.from_dict({"text": [long, "word"]}), tokenizer).ids) == 702 + 3


def test_word_starts_mark_pieces_and_punctuation(tokens: Tokens, tokenizer):
    own = slice(tokens.offsets[1], tokens.offsets[2])
    assert tokens.word_starts is not None
    pairs = zip(tokenizer.convert_ids_to_tokens(tokens.ids[own]), tokens.word_starts[own], strict=True)
    marked = {token: bool(start) for token, start in pairs}
    pieces = {token for token, start in marked.items() if not start}
    assert pieces == {token for token in marked if token.startswith("##")}
    assert pieces, "the text must hold a word of several pieces"
    assert marked[","]
    assert marked["!"]


def test_word_starts_from_the_vocabulary_are_those_of_the_word_ids(imdb, tokenizer):
    written = [f"{t} a {t} b{t}c {t}{t}x ##{t}" for t in tokenizer.all_special_tokens]
    texts = Dataset.from_dict({"text": [*imdb.select(range(300))["text"], *ODD_TEXTS, *written]})
    made = tokenize(texts, tokenizer)
    ids, lengths, by_word_ids = _with_word_ids(texts, tokenizer)
    assert np.array_equal(made.ids, ids)
    assert np.array_equal(np.diff(made.offsets), lengths)
    assert np.array_equal(made.word_starts, by_word_ids)
    assert not by_word_ids.all()


def test_ids_tell_where_words_begin_for_wordpiece_behind_berts_pre_tokenizer_alone(tokenizer):
    pieces = {"[UNK]": 0, "a": 1, "##b": 2}
    backend = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    assert word_begins(backend) is None
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_tokens(["##film"])  # an added token stands by itself, whatever its name
    assert word_begins(backend).tolist() == [True, True, False, True]
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert word_begins(backend) is None, "'a ##b' would begin a word with ##b"
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.model = models.WordPiece(pieces, unk_token="[UNK]", continuing_subword_prefix="b")
    assert word_begins(backend) is None


def test_slow_and_fast_tokenizers_agree(tokens: Tokens, tokenizer):
    class Slow:
        backend_tokenizer = None

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

    slow = tokenize(Dataset.from_dict({"text": TEXTS}), Slow())
    assert slow.ids.tolist() == tokens.ids.tolist()
    assert slow.word_starts is None


@pytest.mark.parametrize("chunk_size", [3, 5, 8])
def test_concat_loses_only_the_tail_of_each_thousand_documents(chunk_size: int):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, 2 * DOCUMENTS_PER_GROUP + 500)
    ids = np.arange(lengths.sum(), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    chunks = concat(Tokens(ids, None, offsets, 1, 1), chunk_size)
    kept = [row["input_ids"] for row in (chunks[i] for i in range(len(chunks)))]
    expected = []
    for first in range(0, len(lengths), DOCUMENTS_PER_GROUP):
        group = ids[offsets[first] : offsets[min(first + DOCUMENTS_PER_GROUP, len(lengths))]]
        expected += [group[i : i + chunk_size] for i in range(0, len(group) - chunk_size + 1, chunk_size)]
    assert [k.tolist() for k in kept] == [e.tolist() for e in expected]


def test_document_chunks_hold_every_token_once_and_one_document_each(tokens: Tokens, tokenizer):
    chunks = document(tokens, 6)
    rows = [chunks[i]["input_ids"].tolist() for i in range(len(chunks))]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert all(row[0] == cls and row[-1] == sep and len(row) <= 6 for row in rows)
    inner = [token for row in rows for token in row[1:-1]]
    assert inner == [token for text in TEXTS for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert all(len(chunks[i]["word_starts"]) == len(rows[i]) for i in range(len(rows)))


def test_chunks_are_views(imdb_tokens: Tokens):
    row = concat(imdb_tokens, 128)[7]["input_ids"]
    assert np.shares_memory(row, imdb_tokens.ids)


@pytest.mark.parametrize("chunking", [concat, document])
@pytest.mark.parametrize("rows", [slice(None), slice(None, None, -1), [0, 1, 3, 4, 2], [5]])
def test_rows_sha256_is_of_little_endian_int32_rows(tokens: Tokens, chunking: Callable, rows: object):
    chunks = chunking(tokens, 4)
    chunks = chunks.select(np.arange(len(chunks))[rows])
    own = b"".join(np.asarray(chunks[i]["input_ids"], "<i4").tobytes() for i in range(len(chunks)))
    assert rows_sha256(chunks) == hashlib.sha256(own).hexdigest()


@pytest.mark.parametrize("number", [11, 37, 1862])
@pytest.mark.parametrize("amounts", [(5, 3), (0.9, 0.1), (0.31, 2)])
def test_the_split_is_the_librarys(tokens: Tokens, number: int, amounts: tuple[float, float]):
    rows = np.arange(number)
    chunks = Chunks(tokens, 1, rows, np.ones(number, np.int64), rows)
    train, held = split_chunks(chunks, train_chunks=amounts[0], eval_chunks=amounts[1], split_seed=7)
    sizes = {"train_size": len(train), "test_size": len(held)}
    right = Dataset.from_dict({"row": rows}).train_test_split(**sizes, seed=7)
    assert (train.samples.tolist(), held.samples.tolist()) == (right["train"]["row"][:], right["test"]["row"][:])


def test_split_takes_shares_and_is_disjoint(imdb_tokens: Tokens):
    chunks = concat(imdb_tokens, 512)
    train, held = split_chunks(chunks, train_chunks=0.9, eval_chunks=0.1)
    assert len(train) == int(0.9 * len(chunks))
    assert not set(train.samples.tolist()) & set(held.samples.tolist())
    for number in range(10, 200):
        some = chunks.select(np.arange(number))
        halves = split_chunks(some, train_chunks=0.9, eval_chunks=0.1)
        assert sum(map(len, halves)) in (number - 1, number), "shares that sum to 1 always fit"
    other, _ = split_chunks(chunks, train_chunks=0.9, eval_chunks=0.1, split_seed=43)
    assert other.samples.tolist() != train.samples.tolist()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"train_chunks": 9, "eval_chunks": 9}, ["7 chunks", "train_chunks=9", "eval_chunks=9", "chunk_size"]),
        ({"train_chunks": 1.5}, ["train_chunks=1.5"]),
        ({"eval_chunks": 0}, ["eval_chunks=0"]),
        ({"train_chunks": -3}, ["train_chunks=-3"]),
        ({"train_chunks": 0.95, "eval_chunks": 0.1}, ["must not exceed 1"]),
    ],
)
def test_split_refuses_what_the_corpus_cannot_give(tokens: Tokens, asked: dict, words: list[str]):
    with pytest.raises(RequestError) as refused:
        split_chunks(concat(tokens, 4), **asked)
    for word in words:
        assert word in str(refused.value)


def test_a_corpus_below_one_chunk_is_named(tokens: Tokens):
    with pytest.raises(RequestError, match=r"no chunk of 400 tokens \(it has \d+ tokens\)"):
        split_chunks(concat(tokens, 400))
