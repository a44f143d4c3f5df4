"""Tokens kept on disk by what they are made of, so that they are made once and read by every run, memory-mapped.

``prepare`` writes, ``train`` and ``evaluate`` read: a run that is refused leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlmx.data.report import content_sha256
from mlmx.data.tokens import Tokens, tokenize

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 1
ARRAYS = ("ids", "word_starts", "offsets")


def tokens_of(texts: Dataset, tokenizer: Any, folder: Path, keep: bool = False) -> Tokens:
    """The tokens of some texts: read from ``folder`` if they were kept there, else made, and kept if asked.

    The key is a hash of the texts and of the tokenizer, so another text or tokenizer is another entry.
    """
    entry = folder / f"tokens-{_key(texts, tokenizer)}"
    if not entry.is_dir():
        made = tokenize(texts, tokenizer)
        if not keep:
            return made
        _write(made, entry)
    return _read(entry)


def _key(texts: Dataset, tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    what = f"{FORMAT} {content_sha256(texts)} {type(tokenizer).__name__} {vocabulary}"
    return hashlib.sha256(what.encode()).hexdigest()[:24]


def _write(tokens: Tokens, entry: Path) -> None:
    """Written aside and renamed as a whole: another process sees all of it or nothing."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".tokens-", dir=entry.parent))
    try:
        for name in ARRAYS:
            array = getattr(tokens, name)
            if array is not None:
                np.save(aside / f"{name}.npy", array)
        affixes = {"num_prefix": tokens.num_prefix, "num_suffix": tokens.num_suffix}
        (aside / "affixes.json").write_text(json.dumps(affixes), encoding="utf-8")
        aside.rename(entry)
    except OSError:
        if not entry.is_dir():  # another process may have been faster, with the same tokens
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _read(entry: Path) -> Tokens:
    arrays = {name: np.load(path, mmap_mode="r") for name in ARRAYS if (path := entry / f"{name}.npy").is_file()}
    affixes = json.loads((entry / "affixes.json").read_text(encoding="utf-8"))
    return Tokens(ids=arrays["ids"], word_starts=arrays.get("word_starts"), offsets=arrays["offsets"], **affixes)
