"""Held-out documents: which they are, their rows for the yardstick, and the words that every tokenizer scores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlmx.config.errors import RequestError, require
from mlmx.data.cache import Entry, TokenCache
from mlmx.data.chunks import Chunks, document
from mlmx.data.hashing import batches, document_keys, hashed_order
from mlmx.data.rng import Words, mix, sample_keys, uniform
from mlmx.data.tokens import Tokens, entry_name, entry_of, take_whole, tokenize, tokens_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Letters and digits, with apostrophes inside: no usual tokenizer makes a piece that reaches beyond such a word.
WORD = re.compile(r"\w+(?:['’]\w+)*")
WORD_RATE = 0.15


def choose(texts: Dataset, most: int) -> Dataset:
    """At most ``most`` different documents, chosen by hash, in their original order."""
    keys = document_keys(texts)
    _, first = np.unique(keys, return_index=True)
    return texts.select(np.sort(first[hashed_order(keys[first])[:most]]))


@dataclass(frozen=True)
class Split:
    """Training and held-out documents, which share no text."""

    train: Dataset
    heldout: Dataset | None
    origin: str  # where the held-out documents come from, in words
    left_out: int = 0  # documents of that source that also stand in the training texts, and so are not scored


@dataclass(frozen=True, kw_only=True)
class DatasetHeldout:
    """What a dataset says of its held-out documents."""

    # The dataset option, or the options of one, they come from where the dataset has no split of its own.
    heldout: str | dict[str, Any] | None = None
    allow_overlap: bool = False  # leave those that also stand in the training texts unscored, instead of refusing


@lru_cache(maxsize=2)  # the jobs of a sweep have the same texts
def split_off(
    train: Dataset, source: Dataset | None, origin: str, documents: int, share: float, allow_overlap: bool
) -> Split:
    """Held-out documents: of a source where there is one, else a content-hashed share of the training texts."""
    keys = document_keys(train)
    if source is None:
        unique = np.unique(keys)
        if (number := round(share * len(unique))) < 1:
            return Split(train, None, "nothing")  # the share is less than a document
        out = np.isin(keys, unique[hashed_order(unique)[: min(documents, number, len(unique) - 1)]])  # with its copies
        rest, held = train.select(np.flatnonzero(~out)), choose(train.select(np.flatnonzero(out)), documents)
        return Split(rest, held, f"a share of {share:g} of the documents")
    shared = np.isin(document_keys(source), keys)
    count = int(shared.sum())
    if count and not allow_overlap:
        first = source[int(shared.argmax())]["text"][:60]
        also = f"{count:,} of its {len(source):,} documents also stand in the training texts, the first: {first!r}"
        instead = "take other held-out documents, or leave these unscored by dataset.allow_overlap=true"
        raise RequestError(f"{origin}: {also}; {instead}")
    remaining = source.select(np.flatnonzero(~shared)) if count else source
    require(len(remaining) > 0, f"{origin}: no held-out document is left that does not stand in the training texts")
    return Split(train, choose(remaining, documents), origin, count)


@dataclass(kw_only=True)
class HeldoutChunks(Chunks):
    """Rows of held-out documents, each document by itself, short tails kept; longest rows first.

    Beside ``input_ids`` a row tells its ``document`` (key), ``position`` (of its first own token in the document) and
    ``chosen``: bool[T], the tokens of the words that are scored in bits per byte.
    """

    keys: NDArray[np.uint64]  # [D], each document's
    rows_of: NDArray[np.int64]  # [n], each row's document number
    chosen: NDArray[np.bool_]  # [N], tokens of chosen words
    word_bytes: NDArray[np.int64]  # [D], UTF-8 bytes of each document's chosen words

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, first = int(self.rows_of[index]), int(self.starts[index])
        own = self.chosen[first : first + int(self.lengths[index])]
        before, after = (np.zeros(len(edge), np.bool_) for edge in (self.prefix, self.suffix))
        return {
            **super().__getitem__(index),
            "document": self.keys[number],
            "position": first - int(self.tokens.offsets[number]) - self.tokens.num_prefix,
            "num_prefix": len(before),
            "num_suffix": len(after),
            "chosen": np.concatenate([before, own, after]),
        }

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


def heldout_chunks(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, chunk_size: int, cache: TokenCache | None = None
) -> HeldoutChunks:
    """The held-out documents as rows of at most ``chunk_size`` tokens, nothing dropped."""
    make = partial(_mark_words, texts, tokenizer)
    entry = make() if cache is None else cache.get(entry_name("heldout", texts, tokenizer), make)
    tokens = tokens_of(entry)
    rows = document(tokens, chunk_size)
    rows = rows.select(np.argsort(-rows.lengths, kind="stable"))
    return HeldoutChunks(
        **vars(rows),
        keys=document_keys(texts),
        rows_of=np.searchsorted(tokens.offsets, rows.starts, side="right") - 1,
        chosen=entry.arrays["chosen"],
        word_bytes=entry.arrays["word_bytes"],
    )


def _mark_words(texts: Dataset, tokenizer: PreTrainedTokenizerBase) -> Entry:
    """The texts' tokens, those of words chosen by (document, character span), and these words' bytes per document.

    A word is a run of letters and digits ("don't" is one); whether it is chosen is drawn from its document's key and
    its first character's position, so the choice knows no tokenizer. A token that touches a chosen word is
    scored with it.
    """
    tokens, keys = tokenize(texts, tokenizer), document_keys(texts)
    chosen = np.zeros(len(tokens.ids), np.bool_)
    word_bytes = np.zeros(len(texts), np.int64)
    backend, number = take_whole(tokenizer), 0
    if backend is None:  # no offsets, no words; bits per byte is then not reported
        return entry_of(tokens, chosen=chosen, word_bytes=word_bytes)
    for batch in batches(texts):
        documents = batch.to_pylist()
        for text, encoding in zip(documents, backend.encode_batch(documents, add_special_tokens=True), strict=True):
            spans = np.array([match.span() for match in WORD.finditer(text)], np.int64).reshape(-1, 2)
            picked = spans[uniform(sample_keys(5, np.full(len(spans), keys[number]), spans[:, 0])) < WORD_RATE]
            word_bytes[number] = sum(len(text[a:b].encode()) for a, b in picked)
            begin, end = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
            last = np.searchsorted(picked[:, 0], end, side="left") - 1  # the last word beginning before a token's end
            touches = (last >= 0) & (end > begin) & ((picked[last, 1] if len(picked) else 0) > begin)
            chosen[tokens.offsets[number] : tokens.offsets[number + 1]] = touches
            number += 1
    return entry_of(tokens, chosen=chosen, word_bytes=word_bytes)


# A word's occurrences in the training tokens → its band.
BANDS = {"unseen": 0, "rare": 1, "medium": 10, "common": 1000}
PIECES = ("first", "continuation")


def token_groups(heldout: Tokens, training: Chunks) -> NDArray[np.int8]:
    """For each held-out token, int8[N]: the frequency band of its word, times two, plus 1 for a continuation piece.

    Bands by occurrences of the word (its exact pieces) in the rows trained on: 0, 1–9, 10–999, 1,000 and more.
    """
    ends = training.starts + training.lengths
    rows = [slice(first, last) for first, last in zip(training.starts.tolist(), ends.tolist(), strict=True)]
    ids, marked = np.concatenate([training.tokens.ids[row] for row in rows]), training.tokens.word_starts
    starts = np.ones(len(ids), np.bool_) if marked is None else np.concatenate([marked[row] for row in rows])
    starts[:1] = True
    whole = starts & np.append(starts[1:], True)  # words of one piece, which are most, are counted by their id
    by_id = np.bincount(ids[whole])
    of_one = np.flatnonzero(by_id).astype(np.int32)
    of_more, counts = np.unique(_words(ids[~whole], starts[~whole])[0], return_counts=True)
    known, counts = np.append(_words(of_one, None)[0], of_more), np.append(by_id[of_one], counts)
    order = np.argsort(known)
    known, counts = known[order], counts[order]
    words, first_pieces = _words(heldout.ids, heldout.word_starts)
    place = np.minimum(np.searchsorted(known, words), len(known) - 1)
    occurrences = np.where(known[place] == words, counts[place], 0)
    bands = np.searchsorted(list(BANDS.values()), occurrences, side="right") - 1
    per_word = np.diff(np.append(np.flatnonzero(first_pieces), len(heldout.ids)))
    groups: NDArray[np.int8] = (np.repeat(bands, per_word) * 2 + ~first_pieces).astype(np.int8)
    return groups


def _words(ids: NDArray[np.int32], word_starts: NDArray[np.bool_] | None) -> tuple[Words, NDArray[np.bool_]]:
    """A hash of each word's pieces, uint64[W], and where words begin, bool[N]."""
    starts = np.ones(len(ids), np.bool_) if word_starts is None else np.array(word_starts)
    starts[:1] = True  # even where a row was cut within a word
    positions = np.arange(len(starts))
    piece = positions - np.maximum.accumulate(np.where(starts, positions, 0))
    hashes = mix(ids.astype(np.uint64) + (piece.astype(np.uint64) << np.uint64(32)))
    return np.add.reduceat(hashes, np.flatnonzero(starts)), starts
