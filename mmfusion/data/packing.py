"""Packing: the samples of one lane, a window at a time, into packs under a budget of tokens and of
media features.

A window of samples (and those carried over from the last) is planned by best-fit decreasing. Packs
that are nearly full go out, and so do packs with a carried sample, so that no sample waits longer
than one window; the samples of the rest are carried. A sample is never split, and never comes twice
in a pack, also where a window holds the end of one epoch and the start of the next. The state of a
lane is (packs, cursor, emitted, carry): with it and the order, any process continues the lane
exactly.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from mmfusion.data.order import key64
from mmfusion.data.state import BadSample, LaneState
from mmfusion.types import PlannedSample, Sample, SampleRef

FULL = 0.98
"""A pack this full in any part of its budget goes out without waiting for more."""

_MANY_BAD = 64
"""Bad samples in a row, over several windows, that an endless lane gives up after."""

Cost = tuple[int, ...]
"""Tokens, then features of each budgeted modality in alphabetical order."""


@dataclass(frozen=True)
class Item:
    """A planned sample on its way into a pack; with the sample itself, where it is kept in memory
    until then.
    """

    ref: SampleRef
    planned: PlannedSample
    cost: Cost
    sample: Sample | None = field(default=None, repr=False, compare=False)


@dataclass
class Pack:
    """Samples of one pack, and the samples found bad while planning it.

    An empty pack stands where a finite lane has no samples left.
    """

    items: list[Item] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)


def best_fit_decreasing(
    costs: Sequence[Cost], budget: Cost, names: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """Lay items into bins: the largest first, each into the bin it leaves least tokens free in.

    Args:
        costs: of each item; none exceeds the budget.
        budget: of a bin.
        names: of each item; no bin holds two items of one name. None: all differ.

    Returns:
        Indices of each bin's items, ascending; bins in the order they were opened.
    """

    def size(i: int) -> float:
        return max(c / b for c, b in zip(costs[i], budget, strict=True) if b)

    bins: list[list[int]] = []
    left: list[list[int]] = []
    held: list[set[Hashable]] = []
    by_tokens: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for i in sorted(range(len(costs)), key=lambda i: (-size(i), i)):
        cost, name = costs[i], i if names is None else names[i]
        for place in range(bisect_left(by_tokens, (cost[0], -1)), len(by_tokens)):
            b = by_tokens[place][1]
            fits = all(c <= free for c, free in zip(cost, left[b], strict=True))
            if fits and name not in held[b]:
                del by_tokens[place]
                break
        else:
            b = len(bins)
            bins.append([])
            left.append(list(budget))
            held.append(set())
        bins[b].append(i)
        held[b].add(name)
        left[b] = [free - c for free, c in zip(left[b], cost, strict=True)]
        insort(by_tokens, (left[b][0], b))
    return [sorted(members) for members in bins]


@dataclass
class _Window:
    """A planned window: items by lane time, the times of each pack, and what is carried on."""

    items: dict[int, Item]
    packs: list[list[int]]
    carry: tuple[int, ...]
    bad: list[BadSample]


class LanePacker:
    """Gives the packs of one lane, in order.

    Args:
        lane, seed: key the order of packs inside a window.
        length: samples of the lane, or None where it is endless.
        window: samples planned together.
        budget: of a pack.
        plan: lane times to planned items or bad samples.
        state: where to go on.
    """

    def __init__(
        self,
        lane: int,
        seed: int,
        length: int | None,
        window: int,
        budget: Cost,
        plan: Callable[[Sequence[int]], list[Item | BadSample]],
        state: LaneState | None = None,
    ) -> None:
        self._lane, self._seed, self._length = lane, seed, length
        self._size, self._budget, self._plan = window, budget, plan
        self.state = state or LaneState()
        self._window: _Window | None = None
        self._carried: dict[int, Item] = {}

    def next(self) -> Pack:
        """The next pack; empty when the lane is over.

        Raises:
            ValueError: where an endless lane finds nothing but bad samples.
        """
        bad: list[BadSample] = []
        fruitless = 0
        while not self.state.exhausted(self._length):
            window = self._window = self._window or self._plan_window()
            if self.state.emitted == 0:
                bad += window.bad
            if self.state.emitted < len(window.packs):
                times = window.packs[self.state.emitted]
                items = [window.items.pop(time) for time in times]
                self._advance(packs=1)
                return Pack(items, bad)
            fruitless += not window.carry
            if fruitless > 3 and len(bad) >= _MANY_BAD and self._length is None:
                raise ValueError(
                    f"lane {self._lane}: the last {len(bad)} samples are all bad, so training "
                    f"cannot go on; expected usable samples. The last ones:\n"
                    + "\n".join(map(str, bad[-5:]))
                )
            self._advance(packs=0)
        self.state = LaneState(self.state.packs + 1, self.state.cursor)
        return Pack([], bad)

    def _advance(self, packs: int) -> None:
        """Count a pack; move on to the next window where this one is used up."""
        state, window = self.state, self._window
        assert window is not None
        emitted = state.emitted + packs
        if emitted < len(window.packs):
            self.state = LaneState(state.packs + packs, state.cursor, emitted, state.carry)
            return
        self._carried = {time: window.items[time] for time in window.carry}
        self._window = None
        cursor = self._end(state.cursor)
        self.state = LaneState(state.packs + packs, cursor, 0, window.carry)

    def _end(self, cursor: int) -> int:
        """Where the window that starts at ``cursor`` ends."""
        end = cursor + self._size
        return end if self._length is None else min(end, self._length)

    def _plan_window(self) -> _Window:
        cursor, carry = self.state.cursor, self.state.carry
        end = self._end(cursor)
        missing = [time for time in carry if time not in self._carried]
        times = [*missing, *range(cursor, end)]
        items = {time: self._carried[time] for time in carry if time in self._carried}
        bad = []
        for time, result in zip(times, self._plan(times), strict=True):
            if isinstance(result, BadSample):
                bad.append(result)
            else:
                items[time] = result
        if lost := [time for time in carry if time not in items]:
            raise ValueError(
                f"lane {self._lane}: samples at times {lost} were planned before but are bad now; "
                "expected the same data and processor as before the restart."
            )
        items = {time: items[time] for time in sorted(items)}
        packs, kept = self._choose(items, last=end == self._length)
        return _Window(items, packs, kept, bad)

    def _choose(
        self, items: dict[int, Item], last: bool
    ) -> tuple[list[list[int]], tuple[int, ...]]:
        """Which packs go out (shuffled: best fit makes them in order of length), what is kept."""
        times, old = list(items), set(self.state.carry)
        packs, kept = [], []
        costs = [item.cost for item in items.values()]
        names = [(item.ref.source, item.ref.index) for item in items.values()]
        for members in best_fit_decreasing(costs, self._budget, names):
            pack = [times[i] for i in members]
            if last or old.intersection(pack) or self._is_full([items[t].cost for t in pack]):
                packs.append(pack)
            else:
                kept += pack
        packs.sort(
            key=lambda pack: key64("pack", self._seed, self._lane, self.state.cursor, pack[0])
        )
        return packs, tuple(sorted(kept))

    def _is_full(self, costs: list[Cost]) -> bool:
        used = [sum(column) for column in zip(*costs, strict=True)]
        return any(u >= FULL * b for u, b in zip(used, self._budget, strict=True) if b)
