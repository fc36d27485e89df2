"""Packing: never above the budget, nothing lost or doubled, full packs, exact continuation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfusion.data.packing import Item, LanePacker, best_fit_decreasing
from mmfusion.data.state import BadSample, LaneState
from mmfusion.types import PlannedSample, SampleRef

BUDGET = (64, 20)
costs = st.tuples(st.integers(1, 64), st.integers(0, 20))


def item(time: int, cost: tuple[int, ...]) -> Item:
    ids = torch.zeros(cost[0], dtype=torch.int64)
    planned = PlannedSample(ids, torch.ones(cost[0], dtype=torch.bool), ())
    return Item(SampleRef("s", 0, time), planned, cost)


def bad(time: int) -> BadSample:
    return BadSample("s", 0, time, "shard", str(time), "broken", "is broken")


def packer(all_costs, window=16, length=None, state=None) -> LanePacker:
    """A lane over given costs (None: a bad sample), from the start again where they end."""

    def plan(times):
        return [
            bad(t)
            if all_costs[t % len(all_costs)] is None
            else item(t, all_costs[t % len(all_costs)])
            for t in times
        ]

    return LanePacker(0, 0, length, window, BUDGET, plan, state)


def times_of(pack) -> list[int]:
    return [item.ref.index for item in pack.items]


@settings(max_examples=50, deadline=None)
@given(st.lists(costs, max_size=60))
def test_bins_hold_every_item_once_within_every_budget(items):
    bins = best_fit_decreasing(items, BUDGET)
    assert sorted(i for members in bins for i in members) == list(range(len(items)))
    for members in bins:
        for part, budget in enumerate(BUDGET):
            assert sum(items[i][part] for i in members) <= budget


def test_the_fullest_bin_that_fits_is_taken():
    assert best_fit_decreasing([(40,), (50,), (14,), (24,)], (64,)) == [[1, 2], [0, 3]]


def test_media_open_a_new_bin_though_tokens_would_fit():
    assert best_fit_decreasing([(5, 15), (5, 15), (5, 5)], (64, 20)) == [[0, 2], [1]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.none(), costs), max_size=80), st.integers(1, 20))
def test_a_finite_lane_gives_each_good_sample_once_and_counts_each_bad_one_once(all_costs, window):
    lane = packer(all_costs, window, length=len(all_costs))
    seen, left_out = [], []
    while not lane.state.exhausted(len(all_costs)):
        pack = lane.next()
        seen += times_of(pack)
        left_out += [sample.index for sample in pack.bad]
    good = [t for t, cost in enumerate(all_costs) if cost is not None]
    assert sorted(seen) == good
    assert sorted(left_out) == [t for t, cost in enumerate(all_costs) if cost is None]
    assert lane.next().items == []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.none(), costs), min_size=5, max_size=50).filter(any),
    st.lists(st.integers(0, 7), min_size=1, max_size=5),
)
def test_a_lane_continued_from_any_state_gives_the_same_packs_and_states(all_costs, stops):
    whole, parts = packer(all_costs), packer(all_costs)
    for stop in stops:
        for _ in range(stop):
            one, other = whole.next(), parts.next()
            assert times_of(one) == times_of(other)
            assert one.bad == other.bad
            assert whole.state == parts.state
        parts = packer(all_costs, state=parts.state)


def test_no_sample_waits_longer_than_one_window():
    lane = packer([(30, 0), (25, 0), (41, 0), (7, 0)], window=8)
    for _ in range(50):
        for time in times_of(lane.next()):
            assert lane.state.cursor - time <= 2 * 8


def test_packs_are_at_least_97_percent_full_on_mixed_lengths():
    generator = torch.Generator().manual_seed(0)
    short = torch.randint(3, 9, (600,), generator=generator)
    long = torch.randint(10, 60, (400,), generator=generator)
    mixed = torch.cat([short, long])[torch.randperm(1000, generator=generator)]
    lane = packer([(int(n), 0) for n in mixed], window=256)
    packs = [lane.next() for _ in range(200)]
    assert sum(i.cost[0] for pack in packs for i in pack.items) / (200 * 64) >= 0.97


def test_packs_of_a_window_do_not_come_in_order_of_length():
    lane = packer([(64 - t % 30, 0) for t in range(300)], window=128)
    longest = [max(i.cost[0] for i in lane.next().items) for _ in range(100)]
    assert longest != sorted(longest, reverse=True)


def test_an_endless_lane_of_bad_samples_stops_and_lists_them():
    with pytest.raises(ValueError, match=r"the last 64 samples are all bad(.|\n)*is broken"):
        packer([None]).next()


def test_an_empty_lane_is_exhausted_from_the_start():
    lane = packer([(1, 0)], length=0)
    assert lane.state.exhausted(0)
    assert lane.next().items == []
    assert lane.state == LaneState(packs=1)


def test_carried_samples_that_turned_bad_stop_the_run():
    with pytest.raises(ValueError, match="planned before but are bad now"):
        packer([None, (3, 0)], state=LaneState(3, 16, 0, (2,))).next()
