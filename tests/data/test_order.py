"""Format v1 of the order: golden vectors, every sample once per epoch, O(1) at any position."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfusion.data.order import Feistel, SourceOrder, key64, permutation

GOLDEN_KEY = 7683785051444978274
GOLDEN_PERMUTATION = [4, 1, 6, 2, 8, 3, 9, 0, 7, 5]
GOLDEN_FEISTEL = [6, 7, 3, 5, 1, 0, 9, 2, 4, 8]
GOLDEN_SMALL = [31, 39, 36, 37, 38, 81, 86, 59, 95, 18, 84, 71]
GOLDEN_BIG = [73614931108, 95668284853, 73614931091, 91565535502, 65163729340]


def test_golden_keys_and_permutations_of_format_v1():
    assert key64("a", 1) == GOLDEN_KEY
    assert permutation(10, 42).tolist() == GOLDEN_PERMUTATION
    assert Feistel(10, 42)(np.arange(10)).tolist() == GOLDEN_FEISTEL


def test_golden_order_of_format_v1():
    order = SourceOrder(100, seed=7, name="stamps", lanes=2, block=4)
    epoch, index = order(np.arange(95, 107))
    assert epoch.tolist() == [0] * 5 + [1] * 7
    assert index.tolist() == GOLDEN_SMALL
    epoch, index = SourceOrder(10**11, seed=7, name="big")(np.array([0, 1, 64, 5 * 10**10, 10**12]))
    assert epoch.tolist() == [0, 0, 0, 0, 10]
    assert index.tolist() == GOLDEN_BIG


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_both_permutations_hit_every_value_once(n, key):
    assert sorted(permutation(n, key)) == list(range(n))
    assert sorted(Feistel(n, key)(np.arange(n))) == list(range(n))


SIZES = [1, 2, 3, 7, 8, 9, 15, 31, 63, 64, 65, 255, 256, 257, 997, 1024, 2049, 10_007]


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "block"), [(64, 256), (8, 4), (1, 1), (12, 3), (64, 2)])
def test_every_sample_once_in_each_epoch(lanes, block):
    for n in SIZES:
        order = SourceOrder(n, seed=1, name="s", lanes=lanes, block=block)
        for epoch in range(3):
            epochs, index = order(np.arange(epoch * n, (epoch + 1) * n))
            assert (epochs == epoch).all()
            assert np.array_equal(np.sort(index), np.arange(n)), (n, lanes, block, epoch)


def test_every_sample_once_where_windows_and_tail_mix():
    n = 200_003
    _, index = SourceOrder(n, seed=3, name="s")(np.arange(n))
    assert np.array_equal(np.sort(index), np.arange(n))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 500), st.integers(1, 9), st.integers(1, 7), st.integers(0, 10**6))
def test_one_at_a_time_equals_all_at_once(n, lanes, block, start):
    positions = np.arange(start, start + 20)
    many = SourceOrder(n, 0, "s", lanes, block)(positions)
    for i, position in enumerate(positions):
        epoch, index = SourceOrder(n, 0, "s", lanes, block)(np.array([position]))
        assert (epoch[0], index[0]) == (many[0][i], many[1][i])


def test_epochs_seeds_and_names_differ():
    base = SourceOrder(1000, 0, "a")(np.arange(1000))[1]
    for other in (
        SourceOrder(1000, 0, "a")(np.arange(1000, 2000))[1],
        SourceOrder(1000, 1, "a")(np.arange(1000))[1],
        SourceOrder(1000, 0, "b")(np.arange(1000))[1],
    ):
        assert (base == other).mean() < 0.02


def test_a_lane_reads_few_blocks_at_a_time():
    order = SourceOrder(10**9, seed=0, name="s", lanes=64, block=256)
    positions = 640_000 * 1024 + 64 * np.arange(1024)
    assert len(np.unique(order(positions)[1] // 256)) == 4


def test_a_batch_comes_from_many_shards():
    index = SourceOrder(10**6, seed=0, name="s")(np.arange(256 * 100))[1].reshape(100, 256)
    distinct = np.mean([len(np.unique(row // 1000)) for row in index])
    full = np.mean(
        [
            len(np.unique(row // 1000))
            for row in np.random.default_rng(0).integers(0, 10**6, (100, 256))
        ]
    )
    assert distinct >= 0.6 * full


def test_any_position_is_reached_at_once():
    def best(n: int, position: int) -> float:
        times = []
        for _ in range(5):
            start = time.process_time()
            SourceOrder(n, 0, "s")(position + 64 * np.arange(256))
            times.append(time.process_time() - start)
        return min(times)

    assert best(10**11, 5 * 10**10) < 10 * best(10**6, 0) + 0.01


@pytest.mark.parametrize("wrong", [{"n": 0}, {"lanes": 0}, {"block": 0}])
def test_sizes_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        SourceOrder(**{"n": 5, "seed": 0, "name": "s", "lanes": 2, "block": 2, **wrong})
