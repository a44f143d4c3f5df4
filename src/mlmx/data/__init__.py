"""Texts → tokens → chunks: each step's value is the next step's argument.

1. `texts`: a dataset's rows ``{"text": str}``, read from the hub, a package or files.
2. `tokens`: all documents as one flat array of token ids, with document offsets and word starts.
3. `chunks`: rows of that array, without copying; `split` chooses those for training and evaluation.
"""

from mlmx.data.chunks import CHUNKINGS, Chunks, concat, document, require_amounts, rows_sha256, split_chunks
from mlmx.data.texts import DATASETS, files, hub, packaged_reviews, quick_check
from mlmx.data.tokens import Tokens, tokenize

__all__ = [
    "CHUNKINGS",
    "DATASETS",
    "Chunks",
    "Tokens",
    "concat",
    "document",
    "files",
    "hub",
    "packaged_reviews",
    "quick_check",
    "require_amounts",
    "rows_sha256",
    "split_chunks",
    "tokenize",
]
