"""Texts → tokens → chunks: each step's value is the next step's argument.

1. `texts`: a dataset's rows ``{"text": str}``, read from the hub, a package or files.
2. `tokens`: all documents as one flat array of token ids, with document offsets and word starts.
3. `chunks`: rows of that array, without copying; `split_chunks` chooses those for training and evaluation.
4. `heldout`: documents that are never trained on, as rows of the yardstick.
"""

from mlmx.data.cache import TokenCache, token_cache
from mlmx.data.chunks import CHUNKINGS, Chunks, concat, document, require_amounts, rows_sha256, split_chunks
from mlmx.data.content import content_sha256
from mlmx.data.examples import Example, choose_examples
from mlmx.data.heldout import (
    BANDS,
    PIECES,
    HeldoutChunks,
    Split,
    choose,
    dataset_heldout,
    heldout_chunks,
    heldout_dials,
    split_off,
    token_groups,
)
from mlmx.data.report import data_report
from mlmx.data.texts import DATASETS, files, hub, packaged_reviews, quick_check
from mlmx.data.tokens import Tokens, tokenize, tokenizer_sha256

__all__ = [
    "BANDS",
    "CHUNKINGS",
    "DATASETS",
    "PIECES",
    "Chunks",
    "Example",
    "HeldoutChunks",
    "Split",
    "TokenCache",
    "Tokens",
    "choose",
    "choose_examples",
    "concat",
    "content_sha256",
    "data_report",
    "dataset_heldout",
    "document",
    "files",
    "heldout_chunks",
    "heldout_dials",
    "hub",
    "packaged_reviews",
    "quick_check",
    "require_amounts",
    "rows_sha256",
    "split_chunks",
    "split_off",
    "token_cache",
    "token_groups",
    "tokenize",
    "tokenizer_sha256",
]
