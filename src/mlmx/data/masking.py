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

from mlmx.config.errors import RequestError, require
from mlmx.config.labels import IGNORE_INDEX
from mlmx.config.options import table
from mlmx.config.plugins import F, call, states
from mlmx.data.rng import Words, bits_at, mix, random_halves, sample_keys, uniform32

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
Draws = NDArray[np.uint32]
Shares = tuple[float, float]  # of the targets: shown as ``[MASK]``, and as a random token
LAST = np.uint32(2**32 - 1)  # stands behind every unit
# Rows of chunks, each a mapping of its own, or those of one length stacked: the same names, one more axis.
Rows = Mapping[str, Any] | Sequence[Mapping[str, Any]]
# float64[B, T] uniforms in [0, 1), bool[B, T] word starts, float64[B, 1] targets to have → bool[B, T] unit starts.
Strategy = Callable[..., Bools]


def strategy(*, words: bool, uniforms: bool) -> Callable[[F], F]:
    """What a strategy needs, both unless it says: a tokenizer that tells where words begin; uniforms to place units by,
    else it gets zeros, as drawing takes time."""
    return states(needs_words=words, needs_uniforms=uniforms)


@strategy(words=False, uniforms=False)
def token(uniforms: Floats, word_starts: Bools, budgets: Floats) -> Bools:
    """Every token is a unit of its own (BERT, Devlin et al. 2019)."""
    return np.ones_like(word_starts)


@strategy(words=True, uniforms=False)
def whole_word(uniforms: Floats, word_starts: Bools, budgets: Floats) -> Bools:
    """A unit is a word with all its pieces (BERT's whole-word release of 2019); punctuation is its own word."""
    return word_starts


@strategy(words=True, uniforms=True)
def span(
    uniforms: Floats, word_starts: Bools, budgets: Floats, *, geometric_p: float = 0.2, max_words: int = 10
) -> Bools:
    """A unit is a span of whole words, its length geometric (SpanBERT, Joshi et al. 2020).

    ``geometric_p`` is the probability that a span ends after a word: 1/p words in the mean, before it is cut at
    ``max_words``, and where a single one would exceed half the row's budget.
    """
    require(0 < geometric_p <= 1, f"masking.geometric_p={geometric_p:g}: must be above 0 and at most 1; usual is 0.2")
    require(max_words >= 1, f"masking.max_words={max_words}: must be at least 1; the usual value is 10")
    longest = np.clip(budgets // 2, 1, max_words).astype(np.int64)  # a float's remainder is slow
    begins = word_starts & (uniforms < geometric_p)
    begins[:, 0] = True
    word = np.cumsum(word_starts, axis=1)
    first_word = np.maximum.accumulate(np.where(begins, word, 0), axis=1)
    cut: Bools = word_starts & ((word - first_word) % longest == 0)
    return begins | cut


MASKINGS: dict[str, Strategy] = table(token, whole_word, span)


def _place_units(strategy: Strategy, uniforms: Floats, word_starts: Bools, budgets: Floats) -> Bools:
    """Where a strategy lets units begin, bool[B, T]; refused if it gives something else."""

    def fits(given: object) -> bool:
        return isinstance(given, np.ndarray) and given.shape == word_starts.shape and given.dtype.kind == "b"

    needed = "bool[B, T], where units begin,"
    return call("masking", strategy, uniforms, word_starts, budgets, fits=fits, needed=needed)


def try_out(strategy: Strategy) -> None:
    """Let a strategy judge its options, and see that it keeps to its contract, on two rows of words."""
    word_starts = np.array([[True, False, True, True, False, False, True, False], [True] * 8])
    uniforms = uniform32(random_halves(np.arange(2, dtype=np.uint64), 8))
    _place_units(strategy, uniforms, word_starts, np.full((2, 1), 1.2))


def replacement_shares(*, mask_share: float = 0.8, random_share: float = 0.1, keep_share: float = 0.1) -> Shares:
    """Shares of the targets shown as ``[MASK]``, as a random token, and as they are."""
    shares = (mask_share, random_share, keep_share)
    got = f"masking.mask_share={mask_share:g}, masking.random_share={random_share:g}, masking.keep_share={keep_share:g}"
    needed = f"each must be 0 or more and together 1 (they sum to {sum(shares):g}); the usual values are 0.8, 0.1, 0.1"
    require(min(shares) >= 0 and abs(sum(shares) - 1) < 1e-9, f"{got}: {needed}")
    return mask_share, random_share


def rate_schedule(*, final_probability: float | None = None) -> float | None:
    """The masking rate of the last epoch; ``mlm_probability`` is that of the first, and it moves linearly between.

    It moves from epoch to epoch, not from step to step: a mask stays a function of (seed, epoch, sample).
    """
    is_share = final_probability is None or 0 < final_probability < 1
    require(is_share, f"masking.final_probability={final_probability}: must lie between 0 and 1, both excluded")
    return final_probability


def require_budget(key: str, rate: float, chunk_size: int) -> None:
    """Refuse a rate at which a chunk would have less than one target."""
    tokens = chunk_size - 2  # the others are special
    if rate * tokens < 1:
        smallest = np.ceil(1000 / tokens) / 1000
        works = f"the smallest that works is {smallest:g}, or choose" if smallest < 1 else "choose"
        few = f"leaves a chunk of {chunk_size} less than one token to predict"
        raise RequestError(f"{key}={rate:g}: {few}; {works} a larger chunk_size")


@dataclass(frozen=True)
class Vocabulary:
    """What masking needs to know of a tokenizer."""

    special: Bools  # [V], ids that are never targets and never replacements
    ordinary: NDArray[np.int32]  # [≤ V], the other ids
    mask_id: int
    pad_id: int


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Masking's view of a tokenizer; refused if it has no mask token."""
    none = f"{tokenizer.name_or_path}: its tokenizer has no mask token, so it is no masked language model"
    has_mask = tokenizer.mask_token_id is not None
    require(has_mask, f"{none}; choose an encoder such as distilbert, bert_base or roberta_base")
    special = np.zeros(len(tokenizer), np.bool_)
    special[[i for i in tokenizer.all_special_ids if i < len(special)]] = True
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.mask_token_id
    return Vocabulary(special, np.flatnonzero(~special).astype(np.int32), tokenizer.mask_token_id, pad)


@dataclass(frozen=True)
class Masker:
    """Collates rows of chunks into a masked batch; holds no state, so any process may call it.

    ``[{"input_ids": int32[T], "word_starts": bool[T], "sample": 7, "epoch": 0}, …]``, or rows of one length stacked
    (``{"input_ids": int32[B, T], "word_starts": bool[B, T], "sample": int64[B], "epoch": int64[B]}``), →
    ``{"input_ids", "labels"[, "attention_mask"]}: LongTensor[B, T]``; ``attention_mask`` only where rows
    differ in length, so that fused attention applies to full ones.
    """

    strategy: Strategy
    vocabulary: Vocabulary
    rates: tuple[float, ...]  # of each epoch; the last one holds from there on
    seed: int
    shares: Shares = (0.8, 0.1)
    fixed: bool = False  # one mask per sample for the whole run, at the first rate (evaluation)
    draws_units: bool = True  # the strategy is given uniforms to place its units by, else zeros

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        ids, word_starts, real = pad(rows, self.vocabulary.pad_id)
        samples = column(rows, "sample")
        epochs = np.zeros_like(samples) if self.fixed else column(rows, "epoch")
        keys = sample_keys(self.seed, epochs, samples, stream=1 if self.fixed else 0)
        rates = np.array(self.rates)[np.minimum(epochs, len(self.rates) - 1)]
        candidates = real & ~self.vocabulary.special.take(ids)
        # Which tokens are to be predicted: ``rate`` of each row's candidates in expectation.
        budgets = (rates * candidates.sum(axis=1, dtype=np.int32))[:, None]
        uniforms = uniform32(random_halves(keys, ids.shape[1])) if self.draws_units else np.zeros(ids.shape)
        unit_starts = _place_units(self.strategy, uniforms, word_starts, budgets)
        draws = random_halves(keys, 1 + ids.shape[1], stream=1)
        at = np.flatnonzero(take_units(unit_starts, candidates, budgets, draws[:, 1:], uniform32(draws[:, :1])))
        row = at // ids.shape[1]
        bits = bits_at(keys[row], at - row * ids.shape[1], stream=2)
        return batch(ids, at, shown(ids.take(at), bits, self.vocabulary, self.shares), real)


def take_units(unit_starts: Bools, candidates: Bools, budgets: Floats, draws: Draws, coins: Floats) -> Bools:
    """Whole units in random order until each row has its budget of targets, bool[B, T].

    The unit that would exceed the budget is taken with the probability that makes the expected number exactly
    the budget; a row with any candidate gets at least one target. The draw at a unit's first token, uint32[B, T], is
    its place in the order, and equal draws make one unit; coins, float64[B, 1] uniforms, are for those that exceed.
    """
    order = draws >> np.uint32(1)  # below LAST
    if not unit_starts.all():  # at every token the draw at its unit's first; a row's first token begins one
        places = np.arange(order.size).reshape(order.shape)
        order = order.take(np.maximum.accumulate(np.where(unit_starts, places, places[:, :1]), axis=1))
    order[~candidates] = LAST
    # The unit at the budget's edge is that of the token at rank `budget`. Where rows differ in it, what lies below the
    # highest is sorted: partitioning by several ranks takes longer.
    rank = budgets[:, 0].astype(np.int64)
    highest = rank.max()
    ranked = np.partition(order, highest, axis=1)[:, : highest + 1]
    if (rank != highest).any():
        ranked.sort(axis=1)
    edge = ranked[np.arange(len(rank)), rank][:, None]
    before = (ranked < edge).sum(axis=1, keepdims=True, dtype=np.int32)
    same = order == edge
    alone = np.count_nonzero(same) == len(same)  # one token each, as is usual: counted at once, which is quick
    size = 1 if alone else same.sum(axis=1, keepdims=True, dtype=np.int32)
    taken = coins * size < budgets - before
    targets: Bools = order < edge + taken
    # A row left without any, its first unit being longer than its whole budget: its shortest unit instead.
    empty = (~taken & (before == 0) & (edge < LAST))[:, 0]
    if empty.any():
        units = order[empty]
        ranked = np.sort(units, axis=1)
        flat = (np.arange(len(units), dtype=np.uint64)[:, None] << np.uint64(32) | ranked).ravel()
        sizes = (np.searchsorted(flat, flat, "right") - np.searchsorted(flat, flat, "left")).reshape(units.shape)
        sizes[ranked == LAST] = units.shape[1] + 1
        shortest = sizes.argmin(axis=1)[:, None]  # among several, the first in order
        targets[empty] = units == np.take_along_axis(ranked, shortest, axis=1)
    return targets


def shown(right: Ids, bits: Words, vocabulary: Vocabulary, shares: Shares) -> Ids:
    """What the model sees of each target, [M]: ``[MASK]``, an ordinary token at random, or the ``right`` id."""
    mask_share, random_share = shares
    fate = bits >> np.uint64(11)  # of 2⁵³
    masked = fate < mask_share * 2**53
    ids = np.where(masked, vocabulary.mask_id, right)
    random = np.flatnonzero((fate < (mask_share + random_share) * 2**53) & ~masked)
    ids[random] = vocabulary.ordinary[mix(~bits[random]) % np.uint64(len(vocabulary.ordinary))]
    return ids


def column(rows: Rows, name: str) -> NDArray[np.int64]:
    """A number of each row, int64[B]."""
    return np.asarray(rows[name] if isinstance(rows, Mapping) else [row[name] for row in rows], np.int64)


def pad(rows: Rows, pad_id: int) -> tuple[Ids, Bools, Bools]:
    """Rows as rectangles: ids int64[B, T], word starts bool[B, T], and which positions are real bool[B, T]."""
    if isinstance(rows, Mapping):
        ids = rows["input_ids"].astype(np.int64, order="C")
        real = np.ones(ids.shape, np.bool_)
        return ids, real if rows["word_starts"] is None else rows["word_starts"], real
    lengths = np.array([len(row["input_ids"]) for row in rows])
    real = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(real.shape, pad_id, np.int64)
    ids[real] = np.concatenate([row["input_ids"] for row in rows])
    word_starts = np.ones(real.shape, np.bool_)
    if rows[0]["word_starts"] is not None:
        word_starts[real] = np.concatenate([row["word_starts"] for row in rows])
    return ids, word_starts, real


def batch(ids: Ids, at: Ids, seen: Ids | int, real: Bools) -> dict[str, torch.Tensor]:
    """Tensors for the model, made of ``ids`` in place: it sees ``seen`` at the targets, int64[M] flat places ``at``."""
    import torch

    labels = np.full(ids.shape, IGNORE_INDEX)
    labels.reshape(-1)[at] = ids.take(at)
    ids.reshape(-1)[at] = seen
    tensors = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    if not real.all():
        tensors["attention_mask"] = torch.from_numpy(real.astype(np.int64))
    return tensors


def masker(
    strategy: partial[Any],
    tokenizer: PreTrainedTokenizerBase,
    mlm_probability: float,
    seed: int,
    shares: Shares = (0.8, 0.1),
    final_probability: float | None = None,
    epochs: float = 1,
) -> Masker:
    """The masker of a run's training batches; refused where whole words are asked of a tokenizer that knows none."""
    tells_words = getattr(tokenizer, "backend_tokenizer", None) is not None
    slow = f"{tokenizer.name_or_path} has no fast tokenizer, which alone tells where words begin"
    slow = f"masking={strategy.func.__name__}: {slow}; use masking=token or a model with a tokenizer.json"
    require(tells_words or not getattr(strategy.func, "needs_words", True), slow)
    last = mlm_probability if final_probability is None else final_probability
    rates = tuple(float(rate) for rate in np.linspace(mlm_probability, last, max(1, int(np.ceil(epochs)))))
    draws_units = getattr(strategy.func, "needs_uniforms", True)
    return Masker(strategy, vocabulary(tokenizer), rates, seed, shares, draws_units=draws_units)
