"""Tokens: every document of a split as one flat array.

``["I rented it.", "Great."]`` → ``ids = [CLS I rented it . SEP CLS great . SEP]``, ``offsets = [0, 6, 10]``.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasets import Dataset

DOCUMENTS_PER_BATCH = 1000


@dataclass(frozen=True)
class Tokens:
    """The documents of a split, tokenised.

    Attributes:
        ids: int32[N], special tokens of each document included.
        word_starts: bool[N], true where a token begins a word (or is special); None without word boundaries.
        offsets: int64[D + 1], document d is ``ids[offsets[d]:offsets[d + 1]]``.
        num_prefix: special tokens before each document's own tokens.
        num_suffix: special tokens after them.
    """

    ids: NDArray[np.int32]
    word_starts: NDArray[np.bool_] | None
    offsets: NDArray[np.int64]
    num_prefix: int
    num_suffix: int

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1


def tokenize(texts: Dataset, tokenizer: Any) -> Tokens:
    """Tokenise all texts, untruncated, each with the model's special tokens.

    Args:
        texts: rows ``{"text": str}``.
        tokenizer: a ``PreTrainedTokenizerBase``; a fast one also tells where words begin.
    """
    encode = _fast if getattr(tokenizer, "backend_tokenizer", None) is not None else _slow
    ids: list[Any] = []
    starts: list[Any] = []
    lengths: list[Any] = []
    for first in range(0, len(texts), DOCUMENTS_PER_BATCH):
        batch = encode(texts[first : first + DOCUMENTS_PER_BATCH]["text"], tokenizer)
        for array, parts in zip(batch, (ids, starts, lengths), strict=True):
            parts.append(array)
    prefix, suffix = _special_affixes(tokenizer)
    flat = np.concatenate(ids).astype(np.int32, copy=False)
    return Tokens(
        ids=flat,
        word_starts=None if starts[0] is None else _split_at_signs(flat, np.concatenate(starts), tokenizer),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64),
        num_prefix=prefix,
        num_suffix=suffix,
    )


def _fast(texts: list[str], tokenizer: Any) -> tuple[Any, Any, Any]:
    backend = tokenizer.backend_tokenizer
    # A tokenizer file may carry truncation and padding of its own; documents are taken whole.
    backend.no_truncation()
    backend.no_padding()
    encodings = backend.encode_batch(texts, add_special_tokens=True)  # encode_batch_fast gives no word ids
    lengths = np.fromiter((len(e) for e in encodings), np.int64, len(encodings))
    total = int(lengths.sum())
    ids = np.fromiter((i for e in encodings for i in e.ids), np.int32, total)
    words = np.fromiter((-1 if w is None else w for e in encodings for w in e.word_ids), np.int32, total)
    starts = np.ones(total, np.bool_)
    starts[1:] = (words[1:] != words[:-1]) | (words[1:] < 0)
    edges = np.cumsum(lengths)[:-1]
    starts[edges[edges < total]] = True
    return ids, starts, lengths


def _split_at_signs(ids: NDArray[np.int32], starts: NDArray[np.bool_], tokenizer: Any) -> NDArray[np.bool_]:
    """Begin a word at each punctuation sign and after it, for tokenizers whose words reach to the next space.

    SentencePiece takes "movie." for one word, WordPiece and byte-level BPE for two: two is what all get here. Pieces
    are judged by their first and last characters.
    """
    encoding = tokenizer.backend_tokenizer.encode("a movie.", add_special_tokens=False)
    if encoding.word_ids[-1] != encoding.word_ids[0] and len(set(encoding.word_ids)) > 2:
        return starts
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    bare = [(piece or "").lstrip("▁") for piece in pieces]
    bare = ["" if piece.startswith("<0x") else piece for piece in bare]  # bytes of a character, not signs
    first = np.array([bool(piece) and _is_sign(piece[0]) for piece in bare])
    last = np.array([bool(piece) and _is_sign(piece[-1]) for piece in bare])
    split: NDArray[np.bool_] = starts | first[ids]
    split[1:] |= last[ids[:-1]]
    return split


def _is_sign(character: str) -> bool:
    """Punctuation or symbol; a vowel sign that combines with its letter is neither."""
    return unicodedata.category(character)[0] in "PS"


def _slow(texts: list[str], tokenizer: Any) -> tuple[Any, Any, Any]:
    rows = tokenizer(texts, truncation=False, padding=False)["input_ids"]
    lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    return np.fromiter((i for row in rows for i in row), np.int32, int(lengths.sum())), None, lengths


def _special_affixes(tokenizer: Any) -> tuple[int, int]:
    """How many special tokens stand before and after a document's own: BERT → (1, 1)."""
    with_specials = tokenizer("a")["input_ids"]
    own = tokenizer("a", add_special_tokens=False)["input_ids"]
    extra = len(with_specials) - len(own)
    prefix = next((n for n in range(extra + 1) if with_specials[n : n + len(own)] == own), 0)
    return prefix, extra - prefix
