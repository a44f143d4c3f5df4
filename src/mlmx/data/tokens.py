"""Tokens: every document of a split as one flat array.

``["I rented it.", "Great."]`` → ``ids = [CLS I rented it . SEP CLS great . SEP]``, ``offsets = [0, 6, 10]``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlmx.data.cache import IN_MEMORY, Entry, TokenCache
from mlmx.data.fast import agreeing_ids
from mlmx.data.hashing import batches, content_sha256

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

FORMAT = 3  # of what is kept


@dataclass(frozen=True, eq=False)  # what has been counted of the very same ones need not be counted again
class Tokens:
    """The documents of a split, tokenised: document d is ``ids[offsets[d]:offsets[d + 1]]``."""

    ids: NDArray[np.int32]  # [N], special tokens of each document included
    word_starts: NDArray[np.bool_] | None  # [N], where a token begins a word (or is special); None: not known
    offsets: NDArray[np.int64]  # [D + 1]
    num_prefix: int  # special tokens before each document's own tokens
    num_suffix: int  # and after them
    tokenized_by: str = "unknown"  # the library and its version


def tokenize(texts: Dataset, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """All texts, untruncated, each with the model's special tokens; a fast tokenizer also tells where words begin."""
    backend, word_starts = take_whole(tokenizer), None
    if backend is None:
        encoded = (tokenizer(some.to_pylist(), truncation=False, padding=False) for some in batches(texts))
        (ids, lengths), by = _end_to_end(row for some in encoded for row in some["input_ids"]), type(tokenizer).__name__
    elif (begins := word_begins(backend)) is not None:
        encodings = (backend.encode_batch_fast(some.to_pylist(), add_special_tokens=True) for some in batches(texts))
        rows = (encoding.ids for some in encodings for encoding in some)
        ids, lengths, by = agreeing_ids(texts, backend) or (*_end_to_end(rows), reference_version())
        word_starts = begins[ids]
    else:
        (ids, lengths, word_starts), by = _with_word_ids(texts, tokenizer), reference_version()
    # Special tokens before and after a document's own: BERT → (1, 1).
    with_specials = tokenizer("a")["input_ids"]
    own = tokenizer("a", add_special_tokens=False)["input_ids"]
    extra = len(with_specials) - len(own)
    prefix = next((n for n in range(extra + 1) if with_specials[n : n + len(own)] == own), 0)
    return Tokens(ids, word_starts, np.append(0, np.cumsum(lengths)), prefix, extra - prefix, by)


def kept_tokens(texts: Dataset, tokenizer: PreTrainedTokenizerBase, cache: TokenCache) -> Tokens:
    """As `tokenize` makes them, out of the cache where it has them."""
    return tokens_of(cache.get(entry_name("tokens", texts, tokenizer), lambda: entry_of(tokenize(texts, tokenizer))))


def entry_name(kind: str, texts: Dataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """``tokens-0123…``: of these texts by this tokenizer, and by no other."""
    what = f"{FORMAT} {content_sha256(texts)} {tokenizer_sha256(tokenizer)}"
    return f"{kind}-{hashlib.sha256(what.encode()).hexdigest()[:24]}"


def entry_of(tokens: Tokens, **more: NDArray[Any]) -> Entry:
    """Tokens as the cache keeps them, and further arrays beside theirs."""
    arrays = {name: getattr(tokens, name) for name in ("ids", "word_starts", "offsets")} | more
    facts = {name: getattr(tokens, name) for name in ("num_prefix", "num_suffix", "tokenized_by")}
    return Entry({name: array for name, array in arrays.items() if array is not None}, facts)


@lru_cache(maxsize=IN_MEMORY)  # the jobs of a sweep get the very same
def tokens_of(entry: Entry) -> Tokens:
    """The tokens of an entry."""
    arrays = entry.arrays
    return Tokens(arrays["ids"], arrays.get("word_starts"), arrays["offsets"], **entry.facts)


def take_whole(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The ``tokenizers.Tokenizer`` inside, told neither to cut nor to pad, whatever its file says; None if slow."""
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return backend


@lru_cache(maxsize=2)  # the jobs of a sweep mostly share a tokenizer, which nobody changes
def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer does, as a checksum: its class and everything in its file, or its vocabulary."""
    backend = take_whole(tokenizer)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{type(tokenizer).__name__} {rules}".encode()).hexdigest()


def reference_version() -> str:
    """``tokenizers 0.23.3``, the library whose tokens are right by definition."""
    return f"tokenizers {importlib.metadata.version('tokenizers')}"


def word_begins(backend: Tokenizer) -> NDArray[np.bool_] | None:
    """For each id, bool[V], whether it begins a word; None where ids do not tell.

    They do for WordPiece behind BERT's pre-tokenizer, which makes every ``#`` a word of its own: a piece that starts
    with ``##`` then always continues a word, and any other begins one.
    """
    kinds = type(backend.model).__name__, type(backend.pre_tokenizer).__name__
    if kinds != ("WordPiece", "BertPreTokenizer") or backend.model.continuing_subword_prefix != "##":
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    begins = np.ones(max(vocabulary.values()) + 1, np.bool_)
    begins[[number for piece, number in vocabulary.items() if piece.startswith("##")]] = False
    begins[list(backend.get_added_tokens_decoder())] = True
    return begins


def _end_to_end(rows: Iterable[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The documents' ids end to end, and how many each has."""
    arrays = [np.array(row, np.int32) for row in rows]
    return np.concatenate(arrays), np.fromiter(map(len, arrays), np.int64, len(arrays))


def _with_word_ids(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
    """Ids end to end, how many each document has, and where words begin, of tokenizers whose ids do not tell."""
    backend, words = tokenizer.backend_tokenizer, []

    def rows() -> Iterator[list[int]]:
        for batch in batches(texts):
            for encoding in backend.encode_batch(batch.to_pylist(), add_special_tokens=True):
                words.append(np.array(encoding.word_ids, np.float64))  # special tokens have None, which becomes nan
                yield encoding.ids

    ids, lengths = _end_to_end(rows())
    word = np.concatenate(words)
    starts = np.ones(len(ids), np.bool_)
    starts[1:] = word[1:] != word[:-1]  # nan differs from everything
    edges = np.cumsum(lengths)[:-1]
    starts[edges[edges < len(ids)]] = True
    # SentencePiece takes "movie." for one word, WordPiece and byte-level BPE for two: two is what all get here. For
    # tokenizers whose words reach to the next space one begins at each sign, by a piece's first character, and after
    # it, by its last.
    probe = backend.encode("a movie.", add_special_tokens=False).word_ids
    if probe[-1] == probe[0] or len(set(probe)) <= 2:
        pieces = [(piece or "").lstrip("▁") for piece in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
        pieces = ["" if piece.startswith("<0x") else piece for piece in pieces]  # bytes of a character, not signs
        kind = unicodedata.category  # Punctuation or Symbol; a vowel sign that combines with its letter is neither
        first, last = (np.array([bool(piece) and kind(piece[at])[0] in "PS" for piece in pieces]) for at in (0, -1))
        starts |= first[ids]
        starts[1:] |= last[ids[:-1]]
    return ids, lengths, starts
