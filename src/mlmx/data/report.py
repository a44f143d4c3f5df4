"""The data report: what a run is trained, evaluated and measured on, in counts and hashes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mlmx.data.chunks import Chunks, rows_sha256
from mlmx.data.hashing import content_sha256, document_keys
from mlmx.data.heldout import HeldoutChunks, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mlmx.data.tokens import Tokens


def data_report(
    source: str,
    texts: Split,
    tokenizer: PreTrainedTokenizerBase,
    chunking: Callable[[Tokens, int], Chunks],
    chunks: Chunks,
    splits: dict[str, Chunks],
    heldout: HeldoutChunks | None,
) -> dict[str, dict[str, Any]]:
    """``data.json``: for the corpus, each split of it and the held-out documents, counts and hashes.

    ``sha256`` is that of `chunks.rows_sha256`, ``content_sha256`` that of `hashing.content_sha256`.
    ``dropped_tokens`` are those of the corpus that fill no chunk; a split drops none of its own.
    """
    parts = {"corpus": chunks, **splits}
    with ThreadPoolExecutor() as pool:  # sha256 takes most of the time and lets other threads run
        report = dict(zip(parts, pool.map(partial(_rows_report, source), parts.values()), strict=True))
    tokens, sizes = chunks.tokens, sorted({64, 128, 256, 512, chunks.chunk_size})
    report["corpus"] |= {
        "documents": len(tokens.offsets) - 1,
        "tokens": len(tokens.ids),
        "dropped_tokens": max(len(tokens.ids) - report["corpus"]["tokens"], 0),
        "chunks_per_chunk_size": {str(size): len(chunking(tokens, size)) for size in sizes},
        **_words_report(tokens, tokenizer.unk_token_id),
        "content_sha256": content_sha256(texts.train),
        "tokenized_by": tokens.tokenized_by,
    }
    if heldout is None or texts.heldout is None:
        return report
    report["heldout"] = _rows_report(texts.origin, heldout) | {
        "documents": len(heldout.keys),
        **_words_report(heldout.tokens, tokenizer.unk_token_id),
        "content_sha256": content_sha256(texts.heldout),
        "left_out_for_overlap": texts.left_out,
        "overlap_with_training": int(np.isin(heldout.keys, document_keys(texts.train)).sum()),
    }
    return report


def _rows_report(source: str, rows: Chunks) -> dict[str, Any]:
    """Counts of some rows: the documents they touch, tokens as the model sees them, chunks of several documents."""
    offsets = rows.tokens.offsets
    first = np.searchsorted(offsets, rows.starts, side="right") - 1
    last = np.searchsorted(offsets, rows.starts + rows.lengths - 1, side="right") - 1
    touched = np.bincount(first, minlength=len(offsets)) - np.bincount(last + 1, minlength=len(offsets))
    return {
        "source": source,
        "documents": int((touched.cumsum() > 0).sum()),
        "tokens": int(rows.lengths.sum()) + len(rows) * (len(rows.prefix) + len(rows.suffix)),
        "chunks": len(rows),
        "dropped_tokens": 0,
        "chunks_spanning_documents": int((first != last).sum()),
        "sha256": rows_sha256(rows),
    }


@lru_cache(maxsize=4)  # those of the jobs of a sweep are the same, and of millions
def _words_report(tokens: Tokens, unknown_id: int | None) -> Mapping[str, float]:
    """How well the tokenizer fits the texts: tokens per word, and the share of tokens it does not know."""
    special = (len(tokens.offsets) - 1) * (tokens.num_prefix + tokens.num_suffix)
    own = max(len(tokens.ids) - special, 1)
    unknown = 0 if unknown_id is None else np.count_nonzero(tokens.ids == unknown_id)
    report = {"unknown_share": unknown / own}
    if tokens.word_starts is not None:
        report["tokens_per_word"] = own / max(int(np.count_nonzero(tokens.word_starts)) - special, 1)
    return report
