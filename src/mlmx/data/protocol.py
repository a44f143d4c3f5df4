"""The yardstick's masks: chosen once per (document, position), whatever the run's chunk size or masking.

A row of held-out text knows its document and where in it it begins; a position's draw depends on those alone. So
every chunk size, batch size and worker count scores the same target tokens, each exactly once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlmx.data.heldout import HeldoutChunks
from mlmx.data.masking import Vocabulary, batch, pad, shown
from mlmx.data.rng import bits_at, random_bits, uniform

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

RATE = 0.15
SHARES = (0.8, 0.1)
YARDSTICK_VERSION = 1


@dataclass(frozen=True)
class Yardstick:
    """Collates rows of `HeldoutChunks`; each token is a target with probability 15 %, shown 80/10/10."""

    vocabulary: Vocabulary

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        ids, _, real = pad(rows, self.vocabulary.pad_id)
        keys = np.array([row["document"] for row in rows], np.uint64)
        # The counter at which a row, special tokens included, begins; below 0 it wraps round, and so do those after it.
        first = np.array([row["position"] - row["num_prefix"] for row in rows], np.int64).astype(np.uint64)
        chosen = uniform(random_bits(keys, ids.shape[1], stream=3, first=first)) < RATE
        begin = np.array([row["num_prefix"] for row in rows])[:, None]
        end = np.array([len(row["input_ids"]) - row["num_suffix"] for row in rows])[:, None]
        positions = np.arange(ids.shape[1])
        own = (positions >= begin) & (positions < end)  # not the special tokens around them
        at = np.flatnonzero(chosen & own & ~self.vocabulary.special[ids])
        row, column = np.divmod(at, ids.shape[1])
        bits = bits_at(keys[row], first[row] + column.astype(np.uint64), stream=4)
        return batch(ids, at, shown(ids.take(at), bits, self.vocabulary, SHARES), real)


@dataclass(frozen=True)
class WholeWords:
    """Collates rows for bits per byte: the tokens of chosen words, all shown as ``[MASK]``. Words are chosen by
    (document, character span), so they are the same words for every tokenizer."""

    vocabulary: Vocabulary

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        ids, _, real = pad(rows, self.vocabulary.pad_id)
        targets = np.zeros_like(real)
        targets[real] = np.concatenate([row["chosen"] for row in rows])
        return batch(ids, np.flatnonzero(targets), self.vocabulary.mask_id, real)


def protocol_id(rows: HeldoutChunks, tokenizer: PreTrainedTokenizerBase) -> str:
    """What ``heldout/*`` was measured on: documents, their tokens, rate, shares and the version of the draws.

    Only runs of one id scored the same targets; runs of different ids are never ranked together.
    """
    what = [np.sort(rows.keys).tolist(), _tokens_sha256(rows), sorted(tokenizer.all_special_ids), len(tokenizer)]
    what += [[RATE, *SHARES], YARDSTICK_VERSION]
    return "heldout-" + hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def protocol_parts(rows: HeldoutChunks, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `protocol_id` is made of, part by part, so that two ids can be told apart in words."""
    return {
        "documents": hashlib.sha256(np.sort(rows.keys).astype("<u8").tobytes()).hexdigest()[:12],
        "tokens": _tokens_sha256(rows)[:12],
        "special_tokens": sorted(tokenizer.all_special_ids),
        "vocabulary": len(tokenizer),
        "rate": RATE,
        "shares": list(SHARES),
        "version": YARDSTICK_VERSION,
    }


def _tokens_sha256(rows: HeldoutChunks) -> str:
    digest, offsets = hashlib.sha256(), rows.tokens.offsets
    for number in np.argsort(rows.keys):
        digest.update(rows.tokens.ids[offsets[number] : offsets[number + 1]].astype("<i4").tobytes() + b"|")
    return digest.hexdigest()
