"""The mixture: exact shares, unique positions, random access; epochs as one finite source."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmfusion.data.mixture import GlobalOrder, Mixture
from mmfusion.data.packing import Item, LanePacker
from mmfusion.types import PlannedSample

GOLDEN_SOURCES = [0, 2, 1, 0, 0, 0, 0, 1, 1, 0, 2, 0, 0, 1, 0, 0]
GOLDEN_K = [0, 1, 0, 1, 2, 3, 4, 1, 2, 5, 0, 7, 6, 3, 8, 9]


def walk(mixture: Mixture, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and k at every global position below ``total``, lane by lane."""
    source, k = np.empty(total, np.int64), np.empty(total, np.int64)
    for lane in range(mixture.lanes):
        places = np.arange(lane, total, mixture.lanes)
        source[places], k[places] = mixture(lane, places // mixture.lanes)
    return source, k


def test_golden_pattern_of_format_v1():
    source, k = walk(Mixture([0.6, 0.3, 0.1], lanes=2), 16)
    assert source.tolist() == GOLDEN_SOURCES
    assert k.tolist() == GOLDEN_K


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=8),
    st.sampled_from([1, 2, 3, 8, 12, 64]),
)
def test_positions_are_unique_keep_their_lane_and_leave_a_small_fringe(weights, lanes):
    mixture = Mixture(weights, lanes)
    total = 20_000
    source, k = walk(mixture, total)
    assert (k % lanes == np.arange(total) % lanes).all()
    for s in range(len(weights)):
        mine = np.sort(k[source == s])
        assert len(np.unique(mine)) == len(mine)
        # Lanes differ by at most a few of their own draws: nothing but the last ones is missing.
        missing = np.setdiff1d(np.arange(len(mine)), mine)
        assert len(missing) == 0 or len(mine) - missing[0] <= 4 * lanes + len(weights)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=10), st.integers(1, 64))
def test_shares_are_exact_to_less_than_one_slot(weights, lanes):
    mixture = Mixture(weights, lanes)
    shares = np.array(weights) / sum(weights)
    assert (abs(mixture.counts - shares * mixture.period) < 1).all()
    source, _ = mixture(lanes - 1, np.arange(3 * mixture.period))
    assert np.array_equal(np.bincount(source), 3 * mixture.counts)


def test_shares_hold_in_every_batch_far_better_than_by_chance():
    source, _ = walk(Mixture([0.6, 0.3, 0.1], 64), 512 * 200)
    deviation = (source == 0).reshape(200, 512).mean(1).std()
    assert deviation < 0.1 * (0.24 / 512) ** 0.5


def test_any_place_alone_equals_the_walk():
    mixture = Mixture([5, 1, 2.5], 12)
    source, k = walk(mixture, 60_000)
    for g in (0, 11, 12, 4096, 49_151, 49_152, 59_999):
        s, position = mixture(g % 12, np.array([g // 12]))
        assert (s[0], position[0]) == (source[g], k[g])


def test_a_rare_source_gets_more_slots_and_weight_zero_none():
    mixture = Mixture([1.0, 0.001, 0.0], 4)
    source, _ = mixture(0, np.arange(mixture.period))
    counts = np.bincount(source, minlength=3)
    assert abs(counts[1] / mixture.period - 0.001 / 1.001) < 1 / mixture.period
    assert counts[2] == 0


@pytest.mark.parametrize(
    "weights", [[], [0.0, 0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]]
)
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="finite, >= 0 and not all 0"):
        Mixture(weights, 4)


def test_a_weight_too_small_to_be_drawn_is_refused():
    with pytest.raises(ValueError, match="never be drawn"):
        Mixture([1.0, 1e-7], 4)


def everything(order: GlobalOrder) -> Counter:
    refs = [
        ref for lane in range(order.lanes) for ref in order(lane, range(order.length(lane) or 0))
    ]
    positions = sorted(ref.position for ref in refs)
    assert positions == list(range(len(refs)))
    return Counter((ref.source, ref.index) for ref in refs)


@pytest.mark.parametrize("lanes", [1, 3, 64])
@pytest.mark.parametrize("sizes", [(1,), (2, 1), (63, 64, 65), (997, 3)])
def test_epochs_see_each_sample_exactly_that_often(lanes, sizes):
    names = [f"s{i}" for i in range(len(sizes))]
    order = GlobalOrder(names, sizes, [1.0] * len(sizes), lanes, 4, seed=0, epochs=3)
    expected = {(name, i): 3 for name, n in zip(names, sizes, strict=True) for i in range(n)}
    assert everything(order) == expected


def test_half_an_epoch_sees_half_the_samples_once():
    order = GlobalOrder(["a", "b"], [60, 40], [1.0, 1.0], 8, 4, seed=0, epochs=0.5)
    seen = everything(order)
    assert len(seen) == 50
    assert set(seen.values()) == {1}


def test_endless_lanes_repeat_no_sample_before_its_epoch_is_over():
    order = GlobalOrder(["a", "b"], [40, 7], [0.5, 0.5], 4, 2, seed=0)
    for lane in range(4):
        refs = order(lane, range(300))
        names = [(ref.source, ref.epoch, ref.index) for ref in refs]
        assert len(set(names)) == len(names)
        for source in "ab":
            epochs = [ref.epoch for ref in refs if ref.source == source]
            assert epochs == sorted(epochs)


@pytest.mark.slow
def test_a_source_of_one_sample_comes_once_an_epoch():
    order = GlobalOrder(["big", "one"], [100, 1], [0.999, 0.001], 8, 4, seed=0)
    refs = [ref for lane in range(8) for ref in order(lane, range(4000))]
    ones = sorted(ref.epoch for ref in refs if ref.source == "one")
    assert ones == sorted(set(ones))
    assert 25 <= len(ones) <= 40


@pytest.mark.parametrize(("weights", "epochs"), [([1.0, 2.0], 1), ([1.0, 1.0], 0)])
def test_epochs_with_weights_are_refused(weights, epochs):
    with pytest.raises(ValueError, match="equally often"):
        GlobalOrder(["a", "b"], [3, 4], weights, 2, 2, 0, epochs)


def test_an_empty_source_is_named():
    with pytest.raises(ValueError, match=r"\['void'\] hold no samples"):
        GlobalOrder(["a", "void"], [3, 0], [1.0, 1.0], 2, 2, 0)


sources = st.lists(
    st.tuples(st.integers(1, 80), st.sampled_from([0.5, 1.0, 3.0])), min_size=1, max_size=3
)


@settings(max_examples=40, deadline=None)
@given(sources, st.integers(1, 9), st.booleans())
@example([(11, 0.5), (11, 0.5), (63, 3.0)], 4, False)
def test_an_epoch_of_a_lane_holds_no_more_than_an_epoch_of_a_source(sources, lanes, finite):
    """But for the rounding of shares: 0, 1, 1, ..., 1, 2 are the epochs of an unlucky span."""
    sizes, weights = zip(*sources, strict=True)
    weights = [1.0] * len(sizes) if finite else weights
    names = [f"s{i}" for i in range(len(sizes))]
    order = GlobalOrder(names, sizes, weights, lanes, 4, 0, 30.0 if finite else None)
    whole = sum(sizes) if finite else min(n / w for n, w in sources) * sum(weights)
    assert abs(order.lane_epoch - max(1, whole / lanes)) <= max(1, 0.01 * whole / lanes)
    for lane in range(lanes):
        for start in range(0, 3 * order.lane_epoch, order.lane_epoch):
            refs = order(lane, range(start, start + order.lane_epoch))
            for name, n, weight in zip(names, sizes, weights, strict=True):
                epochs = [ref.epoch for ref in refs if ref.source == name]
                assert len(epochs) <= max(1, sum(sizes) if finite else n / lanes + 2)
                positions = order.lane_epoch * lanes
                held = positions if finite else 1.01 * positions * weight / sum(weights) + 2
                spread = math.ceil((held - 1) / (sum(sizes) if finite else n))
                assert not epochs or max(epochs) - min(epochs) <= spread


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(sources, st.integers(1, 9), st.integers(1, 300), st.integers(8, 200), st.booleans())
def test_no_pack_holds_a_sample_twice(sources, lanes, window, budget, finite):
    sizes, weights = zip(*sources, strict=True)
    weights = [1.0] * len(sizes) if finite else weights
    names = [f"s{i}" for i in range(len(sizes))]
    order = GlobalOrder(names, sizes, weights, lanes, 4, 0, 30.0 if finite else None)

    def plan(times):
        ids = torch.zeros(8, dtype=torch.int64)
        return [
            Item(ref, PlannedSample(ids, ids > 0, ()), (1 + ref.index % 8,))
            for ref in order(lanes - 1, times)
        ]

    length = order.length(lanes - 1)
    packer = LanePacker(lanes - 1, 0, length, min(window, order.lane_epoch), (budget,), plan)
    for _ in range(60):
        samples = [(item.ref.source, item.ref.index) for item in packer.next().items]
        assert len(samples) == len(set(samples))
