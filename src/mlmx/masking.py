"""Masked batches: which tokens become targets, and what the model sees in their place.

A mask is a pure function of (seed, epoch, sample): no generator carries a history, so worker processes,
batch size, accumulation, process count and resuming change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlmx.config import RequestError, require, table

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label of a position that is not scored, as in torch's cross-entropy
Bools = NDArray[np.bool_]
Words = NDArray[np.uint64]


# --------------------------------------------------------------------------------- the strategies


def token(uniforms: NDArray[np.float64], word_starts: Bools, rate: float) -> Bools:
    """Each token by itself with probability ``rate`` (BERT, Devlin et al. 2019)."""
    return uniforms < rate


def whole_word(uniforms: NDArray[np.float64], word_starts: Bools, rate: float) -> Bools:
    """Each word with probability ``rate``, all of its tokens together.

    The expected number of targets is that of `token`. Words are the tokenizer's: punctuation is its own.
    """
    positions = np.arange(uniforms.shape[1])
    first_of_word = np.maximum.accumulate(np.where(word_starts, positions, 0), axis=1)
    chosen: Bools = np.take_along_axis(uniforms, first_of_word, axis=1) < rate
    return chosen


# A strategy: float64[B, T] uniforms in [0, 1), bool[B, T] word starts, the rate → bool[B, T] targets.
Strategy = Callable[..., Bools]
MASKINGS: dict[str, Strategy] = table(token, whole_word)
NEEDS_WORDS = ("whole_word",)


# ----------------------------------------------------------------------------------- replacements


def replacement_shares(*, mask_share: float = 0.8, random_share: float = 0.1) -> tuple[float, float]:
    """Shares of the targets shown as ``[MASK]`` and as a random token; the rest stay as they are (80/10/10)."""
    require(
        min(mask_share, random_share) >= 0 and mask_share + random_share <= 1,
        f"masking.mask_share={mask_share:g} and masking.random_share={random_share:g}: each must be 0 or more "
        "and their sum at most 1; the usual values are 0.8 and 0.1",
    )
    return mask_share, random_share


@dataclass(frozen=True)
class Vocabulary:
    """What masking needs to know of a tokenizer.

    Attributes:
        special: bool[V], ids that are never targets and never replacements.
        ordinary: int32[≤ V], the other ids.
    """

    special: Bools
    ordinary: NDArray[np.int32]
    mask_id: int
    pad_id: int


def vocabulary(tokenizer: Any) -> Vocabulary:
    """Masking's view of a ``PreTrainedTokenizerBase``.

    Raises:
        RequestError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise RequestError(
            f"{tokenizer.name_or_path}: its tokenizer has no mask token, so it is no masked language model; "
            "choose an encoder such as distilbert, bert_base or roberta_base"
        )
    special = np.zeros(len(tokenizer), np.bool_)
    special[[i for i in tokenizer.all_special_ids if i < len(special)]] = True
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.mask_token_id
    return Vocabulary(special, np.flatnonzero(~special).astype(np.int32), tokenizer.mask_token_id, pad)


# ---------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Masker:
    """Collates rows of chunks into a masked batch; holds no state, so any process may call it.

    ``[{"input_ids": int32[T], "word_starts": bool[T], "sample": 7, "epoch": 0}, …]`` →
    ``{"input_ids", "labels"[, "attention_mask"]}: LongTensor[B, T]``; ``attention_mask`` only where rows
    differ in length, so that fused attention applies to full ones.

    Attributes:
        fixed: one mask per sample for the whole run (evaluation) instead of one per epoch.
    """

    strategy: Strategy
    vocabulary: Vocabulary
    mlm_probability: float
    seed: int
    shares: tuple[float, float] = (0.8, 0.1)
    fixed: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        ids, word_starts, real = self._padded(rows)
        epochs = np.array([0 if self.fixed else row["epoch"] for row in rows])
        samples = np.array([row["sample"] for row in rows])
        keys = sample_keys(self.seed, epochs, samples, stream=1 if self.fixed else 0)
        inputs, labels = self.mask(ids, word_starts, real & ~self.vocabulary.special[ids], keys)
        batch = {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
        if not real.all():
            batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
        return batch

    def mask(
        self, ids: NDArray[np.int64], word_starts: Bools, candidates: Bools, keys: Words
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Masked inputs and labels, both int64[B, T]; at least one target wherever there is a candidate."""
        bits = random_bits(keys, ids.shape[1])
        uniforms = _uniform(bits)
        targets = self.strategy(uniforms, word_starts, self.mlm_probability) & candidates
        empty = ~targets.any(axis=1) & candidates.any(axis=1)
        if empty.any():
            lowest = np.where(candidates, uniforms, 2.0).argmin(axis=1)
            targets[empty, lowest[empty]] = True
        labels = np.where(targets, ids, IGNORED)
        rows, columns = np.nonzero(targets)
        fate = _uniform(_mix(bits[rows, columns]))
        mask_share, random_share = self.shares
        ordinary = self.vocabulary.ordinary
        drawn = ordinary[_mix(~bits[rows, columns]) % np.uint64(len(ordinary))]
        shown = np.where(fate < mask_share, self.vocabulary.mask_id, drawn)
        shown = np.where(fate < mask_share + random_share, shown, ids[rows, columns])
        inputs = ids.copy()
        inputs[rows, columns] = shown
        return inputs, labels

    def _padded(self, rows: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.int64], Bools, Bools]:
        lengths = np.array([len(row["input_ids"]) for row in rows])
        real = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(real.shape, self.vocabulary.pad_id, np.int64)
        ids[real] = np.concatenate([row["input_ids"] for row in rows])
        word_starts = np.ones(real.shape, np.bool_)
        if rows[0]["word_starts"] is not None:
            word_starts[real] = np.concatenate([row["word_starts"] for row in rows])
        return ids, word_starts, real


def masker(
    strategy: partial[Any], tokenizer: Any, mlm_probability: float, seed: int, shares: tuple[float, float]
) -> Masker:
    """The masker of a run's training batches.

    Raises:
        RequestError: no mask token, or whole words asked of a tokenizer that does not tell words apart.
    """
    name = strategy.func.__name__
    if name in NEEDS_WORDS and getattr(tokenizer, "backend_tokenizer", None) is None:
        raise RequestError(
            f"masking={name}: {tokenizer.name_or_path} has no fast tokenizer, which alone tells where words begin; "
            "use masking=token or a model with a tokenizer.json"
        )
    return Masker(strategy, vocabulary(tokenizer), mlm_probability, seed, shares)


# ------------------------------------------------------------------------------------- randomness
# SplitMix64 (Steele, Lea, Flood 2014) read at a counter: number t of a key needs no numbers before it.

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: Words) -> Words:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def sample_keys(seed: int, epochs: NDArray[Any], samples: NDArray[Any], stream: int = 0) -> Words:
    """One 64-bit key per sample, uint64[B], from (seed, stream, epoch, sample)."""
    key = np.full(len(samples), seed * 2 + stream, np.uint64)
    for part in (epochs, samples):
        key = _mix(key + _GOLDEN) ^ part.astype(np.uint64)
    return _mix(key + _GOLDEN)


def random_bits(keys: Words, length: int) -> Words:
    """uint64[B, length] random words: position t of a row depends on its key and t alone."""
    counters = np.arange(1, length + 1, dtype=np.uint64) * _GOLDEN
    return _mix(keys[:, None] + counters)


def _uniform(bits: Words) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) from the upper 53 bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
