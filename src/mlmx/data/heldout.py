"""Held-out documents: which they are, their rows for the yardstick, and the words that every tokenizer scores."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlmx.config import require
from mlmx.data.chunks import Chunks, document
from mlmx.data.tokens import Tokens, tokenize
from mlmx.draws import mix, sample_keys, uniform

if TYPE_CHECKING:
    from datasets import Dataset

WORD = re.compile(r"\w+|[^\w\s]")
WORD_RATE = 0.15


def document_keys(texts: Dataset) -> NDArray[np.uint64]:
    """A document's key is the first 8 bytes of its text's sha256: the same text, the same key, wherever it stands."""
    digests = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8] for text in texts["text"]]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def hashed_order(keys: NDArray[np.uint64], seed: int = 0) -> NDArray[np.int64]:
    """Row numbers in an order that depends on content alone; never "the first N"."""
    order: NDArray[np.int64] = np.argsort(mix(keys ^ mix(np.array([seed + 1], np.uint64))), kind="stable")
    return order


def hold_out(texts: Dataset, share: float, most: int) -> tuple[Dataset, Dataset]:
    """Take a content-hashed share of documents out; every copy of a text goes to the same side.

    Returns:
        ``(training texts, held-out texts)``, both in their original order; at most ``most`` documents are held out.
    """
    keys = document_keys(texts)
    unique = np.unique(keys)
    number = max(1, min(most, round(share * len(unique))))
    require(len(unique) > number, f"heldout.share={share:g}: leaves no document to train on ({len(unique)} in all)")
    chosen = unique[hashed_order(unique)[:number]]
    out = np.isin(keys, chosen)
    return texts.select(np.flatnonzero(~out)), choose(texts.select(np.flatnonzero(out)), most)


def choose(texts: Dataset, most: int) -> Dataset:
    """At most ``most`` different documents, chosen by hash, in their original order."""
    keys = document_keys(texts)
    _, first = np.unique(keys, return_index=True)
    chosen = first[hashed_order(keys[first])[:most]]
    return texts.select(np.sort(chosen))


def overlap(training: Dataset, heldout: Dataset) -> list[int]:
    """Row numbers of held-out documents whose text also stands in the training documents."""
    return np.flatnonzero(np.isin(document_keys(heldout), document_keys(training))).tolist()


@dataclass
class HeldoutChunks(Chunks):
    """Rows of held-out documents, each document by itself, short tails kept; longest rows first.

    Beside ``input_ids`` a row tells its ``document`` (key), ``position`` (of its first own token in the document) and
    ``chosen``: bool[T], the tokens of the words that are scored in bits per byte.

    Attributes:
        keys: uint64[D], each document's key.
        rows_of: int64[n], each row's document number.
        chosen: bool[N], tokens of chosen words.
        word_bytes: int64[D], UTF-8 bytes of each document's chosen words.
    """

    keys: NDArray[np.uint64] | None = None
    rows_of: NDArray[np.int64] | None = None
    chosen: NDArray[np.bool_] | None = None
    word_bytes: NDArray[np.int64] | None = None

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert self.keys is not None
        assert self.rows_of is not None
        assert self.chosen is not None
        row, number = super().__getitem__(index), int(self.rows_of[index])
        first = int(self.starts[index])
        own = self.chosen[first : first + int(self.lengths[index])]
        edges = [np.zeros(len(edge), np.bool_) for edge in (self.prefix, self.suffix)]
        return {
            **row,
            "document": self.keys[number],
            "position": first - int(self.tokens.offsets[number]) - self.tokens.num_prefix,
            "num_prefix": len(self.prefix),
            "num_suffix": len(self.suffix),
            "chosen": np.concatenate([edges[0], own, edges[1]]),
        }


def heldout_chunks(texts: Dataset, tokenizer: Any, chunk_size: int) -> HeldoutChunks:
    """The held-out documents as rows of at most ``chunk_size`` tokens, nothing dropped."""
    tokens = tokenize(texts, tokenizer)
    rows = document(tokens, chunk_size)
    keys = document_keys(texts)
    chosen, word_bytes = chosen_words(texts, tokenizer, tokens, keys)
    rows = rows.select(np.argsort(-rows.lengths, kind="stable"))
    numbers = np.searchsorted(tokens.offsets, rows.starts, side="right") - 1
    return HeldoutChunks(
        **{name: getattr(rows, name) for name in rows.__dataclass_fields__},
        keys=keys,
        rows_of=numbers,
        chosen=chosen,
        word_bytes=word_bytes,
    )


def chosen_words(
    texts: Dataset, tokenizer: Any, tokens: Tokens, keys: NDArray[np.uint64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """The tokens of words chosen by (document, character span), and the words' bytes per document.

    A word is a run of letters and digits or a single other sign; whether it is chosen is drawn from its document's
    key and its first character's position, so the choice knows no tokenizer. A token that touches a chosen word is
    scored with it.
    """
    chosen = np.zeros(len(tokens.ids), np.bool_)
    word_bytes = np.zeros(len(texts), np.int64)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return chosen, word_bytes  # without offsets there are no words; bits per byte is then not reported
    for number, text in enumerate(texts["text"]):
        spans = np.array([match.span() for match in WORD.finditer(text)], np.int64).reshape(-1, 2)
        draws = uniform(sample_keys(5, np.full(len(spans), keys[number]), spans[:, 0]))
        picked = spans[draws < WORD_RATE]
        word_bytes[number] = sum(len(text[a:b].encode("utf-8", "surrogatepass")) for a, b in picked)
        offsets = np.array(backend.encode(text, add_special_tokens=True).offsets, np.int64).reshape(-1, 2)
        last = np.searchsorted(picked[:, 0], offsets[:, 1], side="left") - 1  # the last word beginning before its end
        touches = (last >= 0) & (offsets[:, 1] > offsets[:, 0])
        touches &= (picked[last, 1] if len(picked) else 0) > offsets[:, 0]
        chosen[tokens.offsets[number] : tokens.offsets[number + 1]] = touches
    return chosen, word_bytes
