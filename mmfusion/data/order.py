"""The order of one source: position k in its endless stream -> (epoch, sample index), format v1.

A pure function of (seed, name, number of samples, lanes, block), so it never has to be saved:
any position is reached in O(1) time and memory, also at 1e11 samples. Within an epoch every sample
comes once. Samples are shuffled twice: blocks of contiguous samples by a keyed Feistel permutation
over the whole source, then the samples of a window of a few blocks among themselves. A window is
owned by one lane, so a lane reads only a few blocks at a time. What is left after the last whole
window is shuffled sample by sample.

Format v1 is frozen by golden vectors in the tests: numpy's own ``permutation`` may change between
releases, so every draw here is integer arithmetic over blake2b keys and splitmix64.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
"""Version of the order. Raise it with any change that moves a sample."""

BLOCKS_PER_WINDOW = 4
_ROUNDS = 6
_CACHED_WINDOWS = 256
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Ints = NDArray[np.int64]


def key64(*parts: int | str) -> int:
    """A 64-bit key of named parts; equal on every machine and Python version."""
    text = json.dumps([f"mmfusion-order-v{FORMAT}", *parts], separators=(",", ":"))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(n: int, key: int) -> Ints:
    """(n,) a keyed permutation of range(n): the ranks of n splitmix64 outputs."""
    counters = np.arange(n, dtype=np.uint64) * _GOLDEN + np.uint64(key)
    return np.argsort(_mix64(counters), kind="stable").astype(np.int64)


class Feistel:
    """A keyed permutation of range(n) in O(1) memory: a Feistel network over the next even number
    of bits, walked until the value falls below n (Black and Rogaway, 2002).
    """

    def __init__(self, n: int, key: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs n >= 1, got {n}")
        self.n = n
        half = (max(2, (n - 1).bit_length()) + 1) // 2
        self._half = np.uint64(half)
        self._mask = np.uint64((1 << half) - 1)
        self._keys = [np.uint64(key64("feistel", key, r)) for r in range(_ROUNDS)]

    def __call__(self, values: Ints) -> Ints:
        """(M,) in range(n) to (M,) in range(n)."""
        x = self._once(np.asarray(values, np.uint64))
        while (outside := x >= np.uint64(self.n)).any():
            x[outside] = self._once(x[outside])
        return x.astype(np.int64)

    def _once(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix64(right ^ key) & self._mask)
        return (left << self._half) | right


class SourceOrder:
    """The order of one source.

    Args:
        n: samples in the source.
        seed: of the recipe.
        name: of the source; another name gives another order.
        lanes: L; position k belongs to lane ``k % L``, and a window's blocks to one lane.
        block: contiguous samples that are read near one another.
    """

    def __init__(self, n: int, seed: int, name: str, lanes: int = 64, block: int = 256) -> None:
        for what, value in {"samples": n, "lanes": lanes, "block": block}.items():
            if value < 1:
                raise ValueError(f"source {name!r}: {what} must be at least 1, got {value}")
        self.n, self.lanes, self.block = n, lanes, block
        self._key = (seed, name)
        self._span = lanes * BLOCKS_PER_WINDOW * block
        self._num_blocks = n // block
        self._num_windows = n // self._span
        self._shuffle: tuple[int, Feistel] | None = None
        self._cache: OrderedDict[tuple[int, int, int], Ints] = OrderedDict()

    def __call__(self, positions: Ints) -> tuple[Ints, Ints]:
        """(M,) positions k >= 0 to (M,) epochs and (M,) sample indices."""
        k = np.asarray(positions, np.int64)
        epoch, place = k // self.n, k % self.n
        window = np.minimum(place // self._span, self._num_windows)
        inside = place - window * self._span
        whole = window < self._num_windows
        lane = np.where(whole, k % self.lanes, 0)
        slot = np.where(whole, inside // self.lanes, inside)
        groups, member = np.unique(
            np.stack([epoch, window, lane], axis=1), axis=0, return_inverse=True
        )
        by_group = np.argsort(member.ravel(), kind="stable")
        ends = np.cumsum(np.bincount(member.ravel()))
        index = np.empty_like(k)
        for group, here in zip(groups.tolist(), np.split(by_group, ends)[:-1], strict=True):
            index[here] = self._window(*group)[slot[here]]
        return epoch, index

    def _window(self, epoch: int, window: int, lane: int) -> Ints:
        """Shuffled indices of one lane's window, or of the tail (``window`` past the last)."""
        name = (epoch, window, lane)
        if name not in self._cache:
            if len(self._cache) >= _CACHED_WINDOWS:
                self._cache.popitem(last=False)
            members = self._members(epoch, window, lane)
            key = key64("window", *self._key, epoch, window, lane)
            self._cache[name] = members[permutation(len(members), key)]
        self._cache.move_to_end(name)
        return self._cache[name]

    def _members(self, epoch: int, window: int, lane: int) -> Ints:
        if window < self._num_windows:
            first = (window * self.lanes + lane) * BLOCKS_PER_WINDOW
            return self._blocks(epoch, first, first + BLOCKS_PER_WINDOW)
        first = self._num_windows * self.lanes * BLOCKS_PER_WINDOW
        rest = np.arange(self._num_blocks * self.block, self.n, dtype=np.int64)
        return np.concatenate([self._blocks(epoch, first, self._num_blocks), rest])

    def _blocks(self, epoch: int, first: int, end: int) -> Ints:
        """Samples of the shuffled blocks ``first`` to ``end``."""
        if first >= end:
            return np.zeros(0, np.int64)
        if self._shuffle is None or self._shuffle[0] != epoch:
            key = key64("blocks", *self._key, epoch)
            self._shuffle = (epoch, Feistel(self._num_blocks, key))
        blocks = self._shuffle[1](np.arange(first, end, dtype=np.int64))
        return (blocks[:, None] * self.block + np.arange(self.block, dtype=np.int64)).ravel()
