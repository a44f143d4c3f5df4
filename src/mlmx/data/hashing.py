"""Texts by their content: their bytes without a Python object per text, their hashes, and an order by these."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlmx.data.rng import mix

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# Enough for the tokenizers' threads to share, few enough for what they hand back to stay small.
DOCUMENTS_PER_BATCH = 2000


def batches(texts: Dataset) -> Iterator[pa.Array]:
    """The texts in order as arrow string arrays of at most 2,000 rows."""
    for rows in texts.with_format("arrow").iter(DOCUMENTS_PER_BATCH):
        yield rows["text"].combine_chunks()


def utf8(batch: pa.Array) -> tuple[NDArray[np.int64], memoryview]:
    """An arrow string array as it lies in memory: text i is ``bytes[offsets[i]:offsets[i + 1]]`` (UTF-8)."""
    _, edges, data = batch.buffers()
    width = np.int64 if str(batch.type) == "large_string" else np.int32
    offsets = np.frombuffer(edges, width)[batch.offset : batch.offset + len(batch) + 1].astype(np.int64)
    own = memoryview(b"" if data is None else data)[offsets[0] : offsets[-1]]
    return offsets - offsets[0], own


# A Dataset is never changed in place, so one that was hashed need not be hashed again by the next job of a sweep.
@lru_cache(maxsize=4)
def document_digests(texts: Dataset) -> bytes:
    """Each text's sha256, 32 bytes, one after the other."""
    digests: list[bytes] = []
    for batch in batches(texts):
        offsets, data = utf8(batch)
        digests += [hashlib.sha256(data[a:b]).digest() for a, b in itertools.pairwise(offsets.tolist())]
    return b"".join(digests)


def document_keys(texts: Dataset) -> NDArray[np.uint64]:
    """A document's key is the first 8 bytes of its text's sha256: the same text, the same key, wherever it stands."""
    return np.frombuffer(document_digests(texts), "<u8")[::4].astype(np.uint64)


def content_sha256(texts: Dataset) -> str:
    """Hash of the texts in order: sha256 of their own sha256s, 32 bytes each."""
    return hashlib.sha256(document_digests(texts)).hexdigest()


def hashed_order(keys: NDArray[np.uint64], seed: int = 0) -> NDArray[np.int64]:
    """Row numbers in an order that depends on content alone; never "the first N"."""
    order: NDArray[np.int64] = np.argsort(mix(keys ^ mix(np.array([seed + 1], np.uint64))), kind="stable")
    return order
