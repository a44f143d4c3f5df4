"""Random numbers as a function of a key and a position: SplitMix64 (Steele, Lea, Flood 2014) read at a counter.

Number t of a key needs no numbers before it, so whoever asks, in whatever order, gets the same.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
BY_27, BY_30, BY_31 = np.uint64(27), np.uint64(30), np.uint64(31)
STREAM = 0xD1342543DE82EF95


def mix(state: Words) -> Words:
    """SplitMix64's output function: a bijection of 64-bit words that leaves no visible structure."""
    shifted = state >> BY_30
    state = state ^ shifted
    state *= FIRST
    state ^= np.right_shift(state, BY_27, out=shifted)
    state *= SECOND
    state ^= np.right_shift(state, BY_31, out=shifted)
    return state


def sample_keys(seed: int, epochs: NDArray[Any], samples: NDArray[Any], stream: int = 0) -> Words:
    """One 64-bit key per sample, uint64[B], from (seed, stream, epoch, sample)."""
    key = _first_word(seed * 2 + stream)
    for part in (epochs, samples):
        key = mix((key ^ part.astype(np.uint64)) + GOLDEN)
    return key


@lru_cache
def _first_word(number: int) -> Words:
    """uint64[1], what every key of a seed and stream begins with."""
    return mix(np.full(1, number, np.uint64) + GOLDEN)


def bits_at(keys: Words, positions: NDArray[Any], stream: int = 0) -> Words:
    """uint64 random words: the one at a position depends on its key, the stream and the position alone. Keys and
    positions are broadcast against each other; positions may wrap round below 0."""
    return mix((keys ^ np.uint64(stream * STREAM % 2**64)) + _counters(positions))


def _counters(positions: NDArray[Any]) -> Words:
    counters = positions.astype(np.uint64)
    counters += np.uint64(1)
    counters *= GOLDEN
    return counters


@lru_cache
def _first_counters(length: int) -> Words:
    """uint64[length], those of the positions from 0 on: every batch asks for the same."""
    return _counters(np.arange(length))


def random_bits(keys: Words, length: int, stream: int = 0, first: Words | None = None) -> Words:
    """uint64[B, length]: the words of each key at ``length`` positions from ``first`` (uint64[B], 0 by default) on."""
    if first is None:
        return mix((keys ^ np.uint64(stream * STREAM % 2**64))[:, None] + _first_counters(length))
    return bits_at(keys[:, None], np.arange(length, dtype=np.uint64) + first[:, None], stream)


def random_halves(keys: Words, length: int, stream: int = 0) -> NDArray[np.uint32]:
    """uint32[B, length]: as `random_bits`, two numbers cut from each 64-bit word, the lower half first."""
    words = random_bits(keys, (length + 1) // 2, stream)
    return words.astype("<u8", copy=False).view("<u4")[:, :length]


def uniform(bits: Words) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) from the upper 53 bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform32(halves: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), multiples of 2⁻³²."""
    return halves * np.float64(2.0**-32)
