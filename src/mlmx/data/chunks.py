"""Chunks: rows of the flat token array, and the split into training and evaluation rows."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlmx.config.errors import RequestError, require
from mlmx.config.options import table
from mlmx.config.plugins import call
from mlmx.data.tokens import Tokens

DOCUMENTS_PER_GROUP = 1000


@dataclass
class Chunks:
    """A map-style dataset that is a view of `Tokens`; a row is at most ``chunk_size`` tokens.

    ``chunks[i]`` → ``{"input_ids": int32[T], "word_starts": bool[T] | None, "sample": int, "epoch": int}``
    """

    tokens: Tokens
    chunk_size: int
    starts: NDArray[np.int64]  # [n], where each row's own tokens begin within ``tokens.ids``
    lengths: NDArray[np.int64]  # [n], and how many they are
    samples: NDArray[np.int64]  # [n], a row's number among all chunks of the corpus; masks are keyed by it
    # Special tokens set around each row (document chunking).
    prefix: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    suffix: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    epoch: int = 0  # set by training at the start of each epoch, before workers copy the dataset

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        first = self.starts[index]
        own = slice(first, first + self.lengths[index])
        ids, words = self.tokens.ids[own], self.tokens.word_starts
        starts = None if words is None else words[own]
        if len(self.prefix) or len(self.suffix):
            ids = np.concatenate([self.prefix, ids, self.suffix])
            if starts is not None:
                before, after = np.ones(len(self.prefix), np.bool_), np.ones(len(self.suffix), np.bool_)
                starts = np.concatenate([before, starts, after])
        return {"input_ids": ids, "word_starts": starts, "sample": int(self.samples[index]), "epoch": self.epoch}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any] | list[dict[str, Any]]:
        """Several rows at once, as torch's DataLoader asks for them: those of one length stacked, under the same names
        and with one more axis; others one by one."""
        rows = np.asarray(indices)
        starts, lengths = self.starts[rows], self.lengths[rows]
        if len(self.prefix) or len(self.suffix) or (lengths != lengths[0]).any():
            return [self[index] for index in indices]
        ids, words = self.tokens.ids, self.tokens.word_starts
        return {
            "input_ids": _windows(ids, lengths[0])[starts],
            "word_starts": None if words is None else _windows(words, lengths[0])[starts],
            "sample": self.samples[rows],
            "epoch": np.full(len(rows), self.epoch),
        }

    def select(self, rows: NDArray[np.int64]) -> Chunks:
        """These rows, in this order."""
        return replace(self, starts=self.starts[rows], lengths=self.lengths[rows], samples=self.samples[rows])


def _windows(flat: NDArray[Any], length: int) -> NDArray[Any]:
    """Every run of ``length`` neighbours as a row, [N - length + 1, length], a view. ``sliding_window_view`` gives the
    same, but takes several times longer than the rows themselves."""
    return np.ndarray((len(flat) - length + 1, length), flat.dtype, flat, strides=flat.strides * 2)


def concat(tokens: Tokens, chunk_size: int) -> Chunks:
    """Documents joined end to end and cut every ``chunk_size`` tokens, as in the HF course, chapter 7.3.

    Every 1,000 documents are joined by themselves and their last tokens that fill no chunk are dropped:
    that is what ``datasets.map(batched=True)`` did there, and keeps the rows identical.

    ``[CLS a b SEP][CLS c SEP]``, chunk_size 3 → ``[CLS a b] [SEP CLS c]`` (the last SEP is dropped)
    """
    edges = tokens.offsets[::DOCUMENTS_PER_GROUP]
    if edges[-1] != tokens.offsets[-1]:
        edges = np.append(edges, tokens.offsets[-1])
    groups = itertools.pairwise(edges)
    starts = np.concatenate([np.arange(a, b - chunk_size + 1, chunk_size) for a, b in groups]).astype(np.int64)
    return Chunks(tokens, chunk_size, starts, np.full(len(starts), chunk_size), np.arange(len(starts)))


def document(tokens: Tokens, chunk_size: int) -> Chunks:
    """Each document cut by itself, every piece with its own special tokens; no chunk spans two documents.

    ``[CLS a b c SEP]``, chunk_size 4 → ``[CLS a b SEP] [CLS c SEP]`` (padded within its batch)
    """
    room = chunk_size - tokens.num_prefix - tokens.num_suffix
    first = tokens.offsets[:-1] + tokens.num_prefix
    last = tokens.offsets[1:] - tokens.num_suffix
    pieces = np.maximum(-(-(last - first) // room), 0)
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(first, pieces) + piece * room
    lengths = np.minimum(np.repeat(last, pieces) - starts, room)
    begin, end = tokens.offsets[:2]
    prefix, suffix = tokens.ids[begin : begin + tokens.num_prefix], tokens.ids[end - tokens.num_suffix : end]
    return Chunks(tokens, chunk_size, starts, lengths, np.arange(len(starts)), prefix, suffix)


CHUNKINGS: dict[str, Callable[..., Chunks]] = table(concat, document)


def cut(chunking: Callable[..., Chunks], tokens: Tokens, chunk_size: int) -> Chunks:
    """The chunks that a function of `CHUNKINGS`, or a plugin's, makes of tokens; refused if they break its contract."""

    def fits(given: object) -> bool:
        if not isinstance(given, Chunks) or given.chunk_size != chunk_size:
            return False
        arrays = given.starts, given.lengths, given.samples
        kinds = {(getattr(array, "dtype", None), getattr(array, "shape", None)) for array in arrays}
        if kinds != {(np.dtype(np.int64), (len(given.starts),))}:
            return False
        longest = chunk_size - len(given.prefix) - len(given.suffix)
        inside = (given.starts >= 0) & (given.starts + given.lengths <= len(given.tokens.ids))
        return bool((inside & (given.lengths >= 1) & (given.lengths <= longest)).all())

    needed = f"Chunks of rows of 1 to {chunk_size} tokens that there are, int64[n] starts, lengths and samples,"
    return call("chunking", chunking, tokens, chunk_size, fits=fits, needed=needed)


def try_out(chunking: Callable[..., Chunks], chunk_size: int) -> None:
    """Let a chunking function judge its options, and see that it keeps to its contract, on two made-up documents."""
    size = min(chunk_size, 2**16)
    offsets = np.array([0, 2 * size, 3 * size])
    cut(chunking, Tokens(np.arange(3 * size, dtype=np.int32), np.ones(3 * size, np.bool_), offsets, 1, 1), size)


def split_chunks(
    chunks: Chunks, *, train_chunks: float = 10_000, eval_chunks: float = 1_000, split_seed: int = 42
) -> tuple[Chunks, Chunks]:
    """Rows for training and for evaluation, drawn after chunking as ``datasets``' ``train_test_split`` draws them."""
    wanted = require_amounts(train_chunks, eval_chunks, split_seed)
    # Shares are rounded as the library does, but 0.9 and 0.1 of 37 chunks are not more than 37 of them.
    counts = [w if isinstance(w, int) else round(w * len(chunks), 6) for w in wanted.values()]
    train_size, eval_size = math.floor(counts[0]), math.ceil(counts[1])
    none = f"the corpus gives no chunk of {chunks.chunk_size} tokens (it has {len(chunks.tokens.ids):,} tokens)"
    require(len(chunks) > 0, f"{none}; choose a smaller chunk_size, chunking=document, or more text")
    if train_size + eval_size > len(chunks) or min(train_size, eval_size) < 1:
        given = f"dataset.train_chunks={train_chunks:g} and dataset.eval_chunks={eval_chunks:g}"
        few = f"the corpus gives {len(chunks):,} chunks of {chunks.chunk_size} tokens, too few for {given}"
        raise RequestError(f"{few}; lower these (shares such as 0.9 and 0.1 work too) or chunk_size")
    drawn = np.random.default_rng(split_seed).permutation(len(chunks))
    return chunks.select(drawn[eval_size : eval_size + train_size]), chunks.select(drawn[:eval_size])


def require_amounts(train_chunks: float = 1, eval_chunks: float = 1, split_seed: int = 0) -> dict[str, int | float]:
    """Both amounts as whole numbers of chunks, or shares that leave something to the other."""
    require(split_seed >= 0, f"dataset.split_seed={split_seed}: must be 0 or more; the default is 42")
    wanted: dict[str, int | float] = {}
    for name, value in (("train_chunks", train_chunks), ("eval_chunks", eval_chunks)):
        wanted[name] = int(value) if value >= 1 and float(value).is_integer() else float(value)
        is_amount = isinstance(wanted[name], int) or 0 < value < 1
        require(is_amount, f"dataset.{name}={value:g}: give a number of chunks from 1 up, or a share between 0 and 1")
    given = f"dataset.train_chunks={train_chunks:g} and dataset.eval_chunks={eval_chunks:g}"
    share = sum(value for value in wanted.values() if isinstance(value, float))
    require(share <= 1 + 1e-9, f"{given}: shares of one corpus must not exceed 1 together")
    return wanted


def rows_sha256(chunks: Chunks) -> str:
    """sha256 of the int32 little-endian bytes of ``input_ids``, rows in order."""
    edges = (edge.astype("<i4").tobytes() for edge in (chunks.prefix, chunks.suffix))
    return _rows_sha256(chunks.tokens, chunks.starts.tobytes(), chunks.lengths.tobytes(), *edges)


@lru_cache(maxsize=8)  # most jobs of a sweep have the same rows, which take longer to hash than to compare
def _rows_sha256(of: Tokens, starts_bytes: bytes, lengths_bytes: bytes, prefix: bytes, suffix: bytes) -> str:
    tokens = of.ids.astype("<i4", copy=False).data.cast("B")
    starts, lengths = (np.frombuffer(some, np.int64) for some in (starts_bytes, lengths_bytes))
    ends = starts + lengths
    if not prefix and not suffix:
        # Rows that follow each other in the tokens as well are one stretch of memory.
        gaps = np.flatnonzero(starts[1:] != ends[:-1])
        starts, ends = starts[np.append(0, gaps + 1)], ends[np.append(gaps, -1)]
    # About a megabyte at a time: hashing lets other threads run, and handing over costs more than hashing one row.
    step = max(1, 2**18 * len(starts) // int((ends - starts).sum()))
    digest = hashlib.sha256()
    for some in (slice(first, first + step) for first in range(0, len(starts), step)):
        spans = zip((4 * starts[some]).tolist(), (4 * ends[some]).tolist(), strict=True)
        digest.update(b"".join(part for first, last in spans for part in (prefix, tokens[first:last], suffix)))
    return digest.hexdigest()
