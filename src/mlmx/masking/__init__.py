"""Masked batches: which tokens become targets, and what the model sees in their place.

1. A strategy says where units begin: every token, every word, every span of words.
2. Units are taken whole, in random order, until the row's budget of targets is filled. The budget is the same
   for every strategy, so strategies differ only in what is masked together.
3. Of the targets, 80 % are shown as ``[MASK]``, 10 % as a random token, 10 % as they are.

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
from mlmx.draws import Words, mix, random_bits, sample_keys, uniform

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label of a position that is not scored, as in torch's cross-entropy
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


# --------------------------------------------------------------------------------- the strategies


def token(uniforms: Floats, word_starts: Bools, budgets: Floats) -> Bools:
    """Every token is a unit of its own (BERT, Devlin et al. 2019)."""
    return np.ones_like(word_starts)


def whole_word(uniforms: Floats, word_starts: Bools, budgets: Floats) -> Bools:
    """A unit is a word with all its pieces (BERT's whole-word release of 2019); punctuation is its own word."""
    return word_starts


def span(
    uniforms: Floats, word_starts: Bools, budgets: Floats, *, geometric_p: float = 0.2, max_words: int = 10
) -> Bools:
    """A unit is a span of whole words, its length geometric (SpanBERT, Joshi et al. 2020).

    Args:
        geometric_p: probability that a span ends after a word; mean length 1/p words before the cut.
        max_words: longer spans are cut here, and where a single one would exceed half the row's budget.
    """
    require(0 < geometric_p <= 1, f"masking.geometric_p={geometric_p:g}: must be above 0 and at most 1; usual is 0.2")
    require(max_words >= 1, f"masking.max_words={max_words}: must be at least 1; the usual value is 10")
    longest = np.clip(budgets // 2, 1, max_words)
    begins = word_starts & (uniforms < geometric_p)
    begins[:, 0] = True
    word = np.cumsum(word_starts, axis=1)
    first_word = np.maximum.accumulate(np.where(begins, word, 0), axis=1)
    cut: Bools = word_starts & ((word - first_word) % longest == 0)
    return begins | cut


# float64[B, T] uniforms in [0, 1), bool[B, T] word starts, float64[B, 1] targets to have → bool[B, T] unit starts.
Strategy = Callable[..., Bools]
MASKINGS: dict[str, Strategy] = table(token, whole_word, span)
NEEDS_WORDS = ("whole_word", "span")


# ------------------------------------------------------------------------------- rate and shares


def replacement_shares(
    *, mask_share: float = 0.8, random_share: float = 0.1, keep_share: float = 0.1
) -> tuple[float, float]:
    """Shares of the targets shown as ``[MASK]``, as a random token, and as they are."""
    shares = (mask_share, random_share, keep_share)
    require(
        min(shares) >= 0 and abs(sum(shares) - 1) < 1e-9,
        f"masking.mask_share={mask_share:g}, masking.random_share={random_share:g}, masking.keep_share={keep_share:g}: "
        f"each must be 0 or more and together 1 (they sum to {sum(shares):g}); the usual values are 0.8, 0.1, 0.1",
    )
    return mask_share, random_share


def rate_schedule(*, final_probability: float | None = None) -> float | None:
    """The masking rate of the last epoch; ``mlm_probability`` is that of the first, and it moves linearly between.

    It moves from epoch to epoch, not from step to step: a mask stays a function of (seed, epoch, sample).
    """
    require(
        final_probability is None or 0 < final_probability < 1,
        f"masking.final_probability={final_probability}: must lie between 0 and 1, both excluded",
    )
    return final_probability


def require_budget(key: str, rate: float, chunk_size: int, num_special: int = 2) -> None:
    """Refuse a rate at which a chunk would have less than one target."""
    tokens = chunk_size - num_special
    smallest = np.ceil(1000 / tokens) / 1000
    if rate * tokens < 1:
        works = f"the smallest that works is {smallest:g}, or choose" if smallest < 1 else "choose"
        raise RequestError(
            f"{key}={rate:g}: leaves a chunk of {chunk_size} less than one token to predict; {works} "
            "a larger chunk_size"
        )


# ---------------------------------------------------------------------------------- the vocabulary


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
        rates: masking rate of each epoch; the last one holds from there on.
        fixed: one mask per sample for the whole run, at the first rate (evaluation).
    """

    strategy: Strategy
    vocabulary: Vocabulary
    rates: tuple[float, ...]
    seed: int
    shares: tuple[float, float] = (0.8, 0.1)
    fixed: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        ids, word_starts, real = pad(rows, self.vocabulary.pad_id)
        epochs = np.array([0 if self.fixed else row["epoch"] for row in rows])
        samples = np.array([row["sample"] for row in rows])
        keys = sample_keys(self.seed, epochs, samples, stream=1 if self.fixed else 0)
        rates = np.array(self.rates)[np.minimum(epochs, len(self.rates) - 1)]
        targets = self.targets(word_starts, real & ~self.vocabulary.special[ids], keys, rates)
        bits = random_bits(keys, ids.shape[1], stream=2)
        return batch(replace_targets(ids, targets, bits, self.vocabulary, self.shares), ids, targets, real)

    def targets(self, word_starts: Bools, candidates: Bools, keys: Words, rates: Floats) -> Bools:
        """Which tokens are to be predicted, bool[B, T]: ``rate`` of each row's candidates in expectation."""
        length = word_starts.shape[1]
        budgets = (rates * candidates.sum(axis=1))[:, None]
        unit_starts = self.strategy(uniform(random_bits(keys, length)), word_starts, budgets)
        return take_units(unit_starts, candidates, budgets, uniform(random_bits(keys, length, stream=1)))


def take_units(unit_starts: Bools, candidates: Bools, budgets: Floats, uniforms: Floats) -> Bools:
    """Whole units in random order until each row has its budget of targets.

    The unit that would exceed the budget is taken with the probability that makes the expected number exactly
    the budget; a row with any candidate gets at least one target.
    """
    rows, length = candidates.shape
    positions = np.arange(length)
    first = np.maximum.accumulate(np.where(unit_starts, positions, 0), axis=1)
    order_key = np.where(candidates, np.take_along_axis(uniforms, first, axis=1), 2.0)
    order = np.argsort(order_key, axis=1, kind="stable")
    ranked = np.take_along_axis(order_key, order, axis=1)
    # In rank order a unit is a run of equal keys, [begin, end).
    changes = np.ones((rows, length + 1), np.bool_)
    changes[:, 1:-1] = ranked[:, 1:] != ranked[:, :-1]
    begin = np.maximum.accumulate(np.where(changes[:, :-1], positions, 0), axis=1)
    end = np.minimum.accumulate(np.where(changes[:, 1:], positions + 1, length)[:, ::-1], axis=1)[:, ::-1]
    # One more uniform per unit decides at the edge: the fraction of its key, scaled up, is as good as a new draw.
    edge = (ranked * 2.0**20) % 1.0
    taken = (end <= budgets) | ((begin < budgets) & (edge < (budgets - begin) / (end - begin)))
    taken &= ranked < 2.0
    # A row left without any, its first unit being longer than its whole budget: its shortest unit instead.
    none = ~taken.any(axis=1) & candidates.any(axis=1)
    sizes = np.where(ranked < 2.0, end - begin, length + 1)[none]
    shortest = np.take_along_axis(begin[none], sizes.argmin(axis=1)[:, None], axis=1)
    taken[none] = (begin[none] == shortest) & (ranked[none] < 2.0)
    targets = np.zeros((rows, length), np.bool_)
    np.put_along_axis(targets, order, taken, axis=1)
    return targets


def replace_targets(
    ids: NDArray[np.int64], targets: Bools, bits: Words, vocabulary: Vocabulary, shares: tuple[float, float]
) -> NDArray[np.int64]:
    """What the model sees, int64[B, T]: targets as ``[MASK]``, as an ordinary random token, or as they are."""
    rows, columns = np.nonzero(targets)
    own = bits[rows, columns]
    fate = uniform(own)
    drawn = vocabulary.ordinary[mix(~own) % np.uint64(len(vocabulary.ordinary))]
    mask_share, random_share = shares
    shown = np.where(fate < mask_share, vocabulary.mask_id, drawn)
    inputs = ids.copy()
    inputs[rows, columns] = np.where(fate < mask_share + random_share, shown, ids[rows, columns])
    return inputs


def pad(rows: Sequence[Mapping[str, Any]], pad_id: int) -> tuple[NDArray[np.int64], Bools, Bools]:
    """Rows as rectangles: ids int64[B, T], word starts bool[B, T], and which positions are real bool[B, T]."""
    lengths = np.array([len(row["input_ids"]) for row in rows])
    real = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(real.shape, pad_id, np.int64)
    ids[real] = np.concatenate([row["input_ids"] for row in rows])
    word_starts = np.ones(real.shape, np.bool_)
    if rows[0]["word_starts"] is not None:
        word_starts[real] = np.concatenate([row["word_starts"] for row in rows])
    return ids, word_starts, real


def batch(inputs: NDArray[np.int64], ids: NDArray[np.int64], targets: Bools, real: Bools) -> dict[str, torch.Tensor]:
    """Tensors for the model: ``labels`` hold the original ids at targets and −100 elsewhere."""
    import torch

    tensors = {
        "input_ids": torch.from_numpy(inputs),
        "labels": torch.from_numpy(np.where(targets, ids, IGNORED)),
    }
    if not real.all():
        tensors["attention_mask"] = torch.from_numpy(real.astype(np.int64))
    return tensors


def try_out(strategy: partial[Any]) -> None:
    """Let a strategy judge its options, on a row of one word."""
    strategy(np.zeros((1, 1)), np.ones((1, 1), np.bool_), np.ones((1, 1)))


def masker(
    strategy: partial[Any],
    tokenizer: Any,
    mlm_probability: float,
    seed: int,
    shares: tuple[float, float] = (0.8, 0.1),
    final_probability: float | None = None,
    epochs: float = 1,
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
    last = mlm_probability if final_probability is None else final_probability
    rates = tuple(float(rate) for rate in np.linspace(mlm_probability, last, max(1, int(np.ceil(epochs)))))
    return Masker(strategy, vocabulary(tokenizer), rates, seed, shares)
