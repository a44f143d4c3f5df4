"""Held-out documents: which they are, their rows for the yardstick, and the words that every tokenizer scores."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlmx.config import require
from mlmx.data.chunks import Chunks, document
from mlmx.data.tokens import Tokens, tokenize
from mlmx.draws import mix, sample_keys, uniform

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# Letters and digits, with apostrophes inside: no usual tokenizer makes a piece that reaches beyond such a word.
WORD = re.compile(r"\w+(?:['’]\w+)*")
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
    number = min(most, round(share * len(unique)), len(unique) - 1)
    chosen = unique[hashed_order(unique)[:number]]
    out = np.isin(keys, chosen)
    return texts.select(np.flatnonzero(~out)), choose(texts.select(np.flatnonzero(out)), most)


def choose(texts: Dataset, most: int) -> Dataset:
    """At most ``most`` different documents, chosen by hash, in their original order."""
    keys = document_keys(texts)
    _, first = np.unique(keys, return_index=True)
    chosen = first[hashed_order(keys[first])[:most]]
    return texts.select(np.sort(chosen))


@dataclass(frozen=True)
class Split:
    """Training and held-out documents, which share no text.

    Attributes:
        origin: where the held-out documents come from, in words.
        left_out: documents of the held-out source that also stand in the training texts, and so are not scored.
    """

    train: Dataset
    heldout: Dataset | None
    origin: str
    left_out: int = 0


def heldout_dials(
    *, dataset: str | dict[str, Any] | None = None, documents: int = 400, share: float = 0.02
) -> tuple[str | dict[str, Any] | None, int, float]:
    """The ``heldout`` node of a config.

    Args:
        dataset: a dataset option (``rotten_tomatoes_packaged``) or the options of one to take documents from; null:
            the dataset's own test split, else what the dataset names, else a share of it.
        documents: at most so many are scored, chosen by content hash.
        share: of the documents, taken out before chunking where there is no other source; 0 takes none, and then
            nothing is held out.
    """
    require(documents >= 1, f"heldout.documents={documents}: must be at least 1; the default is 400")
    require(0 <= share < 1, f"heldout.share={share:g}: must be 0 or more and less than 1; the default is 0.02")
    return dataset, documents, share


def dataset_heldout(*, heldout: str | None = None, allow_overlap: bool = False) -> tuple[str | None, bool]:
    """What a dataset says of its held-out documents.

    Args:
        heldout: the dataset option they come from where the dataset has no split of its own.
        allow_overlap: leave held-out documents that also stand in the training texts unscored, instead of refusing.
    """
    return heldout, allow_overlap


def split_off(
    texts: Dataset | DatasetDict, other: Dataset | None, origin: str, documents: int, share: float, allow_overlap: bool
) -> Split:
    """Held-out documents: of another source where one is given, else the dataset's own, else a share of it.

    Raises:
        RequestError: held-out documents stand in the training texts too (counted, the first one quoted).
    """
    own = texts.get("heldout") if isinstance(texts, dict) else None
    train: Dataset = texts["train"] if isinstance(texts, dict) else texts
    if other is None and own is None:
        if round(share * len(set(train["text"]))) < 1:
            return Split(train, None, "nothing")  # the share is less than a document
        rest, held = hold_out(train, share, documents)
        return Split(rest, held, f"a share of {share:g} of the documents")
    source: Dataset = other if other is not None else own
    shared = np.isin(document_keys(source), document_keys(train))
    count = int(shared.sum())
    require(
        count == 0 or allow_overlap,
        f"{origin}: {count:,} of its {len(source):,} documents also stand in the training texts, the first: "
        f"{source[int(shared.argmax())]['text'][:60]!r}; take other held-out documents, or leave these unscored by "
        "dataset.allow_overlap=true",
    )
    remaining = source.select(np.flatnonzero(~shared))
    require(len(remaining) > 0, f"{origin}: no held-out document is left that does not stand in the training texts")
    return Split(train, choose(remaining, documents), origin, count)


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

    keys: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    rows_of: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    chosen: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    word_bytes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, number = super().__getitem__(index), int(self.rows_of[index])
        first = int(self.starts[index])
        own = self.chosen[first : first + int(self.lengths[index])]
        edges = [np.zeros(len(edge), np.bool_) for edge in (self.prefix, self.suffix)]
        return {
            **row,
            "document": self.keys[number],
            "position": first - int(self.tokens.offsets[number]) - self.tokens.num_prefix,
            "start": first,
            "length": int(self.lengths[index]),
            "num_prefix": len(self.prefix),
            "num_suffix": len(self.suffix),
            "chosen": np.concatenate([edges[0], own, edges[1]]),
        }

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


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

    A word is a run of letters and digits ("don't" is one); whether it is chosen is drawn from its document's key and
    its first character's position, so the choice knows no tokenizer. A token that touches a chosen word is
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


# ------------------------------------------------------------------------------- word frequencies

# A word's occurrences in the training tokens → its band.
BANDS = {"unseen": 0, "rare": 1, "medium": 10, "common": 1000}
PIECES = ("first", "continuation")


def token_groups(heldout: Tokens, training: Chunks) -> NDArray[np.int8]:
    """For each held-out token, int8[N]: the frequency band of its word, times two, plus 1 for a continuation piece.

    Bands by occurrences of the word (its exact pieces) in the rows trained on: 0, 1–9, 10–999, 1,000 and more.
    """
    spans = [slice(start, start + length) for start, length in zip(training.starts, training.lengths, strict=True)]
    starts = training.tokens.word_starts
    known, counts = np.unique(
        _words(
            np.concatenate([training.tokens.ids[span] for span in spans]),
            None if starts is None else np.concatenate([starts[span] for span in spans]),
        )[0],
        return_counts=True,
    )
    words, first_pieces = _words(heldout.ids, heldout.word_starts)
    place = np.minimum(np.searchsorted(known, words), len(known) - 1)
    occurrences = np.where(known[place] == words, counts[place], 0)
    bands = np.searchsorted(list(BANDS.values()), occurrences, side="right") - 1
    per_word = np.diff(np.append(np.flatnonzero(first_pieces), len(heldout.ids)))
    groups: NDArray[np.int8] = (np.repeat(bands, per_word) * 2 + ~first_pieces).astype(np.int8)
    return groups


def _words(
    ids: NDArray[np.int32], word_starts: NDArray[np.bool_] | None
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """A hash of each word's pieces, uint64[W], and where words begin, bool[N]."""
    starts = np.ones(len(ids), np.bool_) if word_starts is None else word_starts.copy()
    starts[0] = True
    positions = np.arange(len(starts))
    piece = positions - np.maximum.accumulate(np.where(starts, positions, 0))
    hashes = mix(ids.astype(np.uint64) + (piece.astype(np.uint64) << np.uint64(32)))
    return np.add.reduceat(hashes, np.flatnonzero(starts)), starts
