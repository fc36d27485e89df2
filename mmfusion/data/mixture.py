"""The global stream of samples: lane and lane time -> (source, epoch, index).

Global position g = time * L + lane. Two modes:

* **Weights** (endless): a pattern of P slots holds every source in its exact share (largest
  remainder), spread evenly; each lane walks the pattern from a phase of its own. The j-th slot of
  a source on a lane is that source's position ``k = j * L + lane``, so k is unique,
  ``k % L == g % L`` and everything is random access.
* **Epochs** (finite): all sources laid end to end are one source, and ``k = g``. Every sample is
  seen exactly ``epochs`` times.

With weights, lanes advance by packs, so they run ahead of one another by a few windows: when a run
stops (or an epoch turns) some lanes have begun a source's next epoch while others still finish
the last one. Within a lane no sample repeats before its epoch is over.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmfusion.data.order import Ints, SourceOrder
from mmfusion.types import SampleRef

_MIN_SLOTS, _MAX_SLOTS = 1 << 12, 1 << 16


class Mixture:
    """The pattern of sources by weights.

    Args:
        weights: of each source, any scale; 0 leaves a source out.
        lanes: L.
    """

    def __init__(self, weights: Sequence[float], lanes: int) -> None:
        self.lanes = lanes
        self.counts = _shares(weights)
        self.period = int(self.counts.sum())
        # Slot i of a source with c slots belongs at (i + 1/2) / c of the period.
        place = np.concatenate([(np.arange(c) + 0.5) / c for c in self.counts if c])
        source = np.repeat(np.arange(len(self.counts)), self.counts)
        self._source = source[np.argsort(place, kind="stable")]
        self._rank = np.zeros(self.period, np.int64)
        for s, count in enumerate(self.counts):
            self._rank[self._source == s] = np.arange(count)

    def __call__(self, lane: int, times: Ints) -> tuple[Ints, Ints]:
        """Lane times (M,) to sources (M,) and positions k (M,) in them."""
        phase = lane * self.period // self.lanes
        place = np.asarray(times, np.int64) + phase
        turn, slot = place // self.period, place % self.period
        source = self._source[slot]
        before = np.bincount(self._source[:phase], minlength=len(self.counts))
        seen = turn * self.counts[source] + self._rank[slot] - before[source]
        return source, seen * self.lanes + lane


def _shares(weights: Sequence[float]) -> Ints:
    """Slots of each source: exact shares by largest remainder, ties to the earlier source."""
    w = np.asarray(weights, float)
    if len(w) == 0 or not np.isfinite(w).all() or (w < 0).any() or not w.any():
        raise ValueError(
            f"weights of the sources must be finite, >= 0 and not all 0, got {list(weights)}"
        )
    w = w / w.sum()
    period = _MIN_SLOTS
    while period < _MAX_SLOTS and w[w > 0].min() * period < 16:
        period *= 2
    counts = np.floor(w * period).astype(np.int64)
    order = np.argsort(counts - w * period, kind="stable")
    counts[order[: period - counts.sum()]] += 1
    if ((w > 0) & (counts == 0)).any():
        raise ValueError(
            f"a weight is below 1/{_MAX_SLOTS} of the sum and would never be drawn, got shares "
            f"{w.tolist()}; raise it, or set it to 0 to leave the source out."
        )
    return counts


class GlobalOrder:
    """Which sample is at each time of each lane.

    Args:
        names, sizes, weights: of the sources, in the recipe's order.
        lanes, block, seed: see :class:`mmfusion.data.order.SourceOrder`.
        epochs: passes over all sources (then weights must be equal), or None for an endless
            mixture by weights.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        weights: Sequence[float],
        lanes: int,
        block: int,
        seed: int,
        epochs: float | None = None,
    ) -> None:
        if lanes < 1:
            raise ValueError(f"lanes must be at least 1, got {lanes}")
        if empty := [name for name, size in zip(names, sizes, strict=True) if size < 1]:
            raise ValueError(f"sources {empty} hold no samples; remove them or build their shards.")
        self.names, self.lanes = list(names), lanes
        self.total: int | None = None
        self.lane_epoch: int
        """Samples a lane gives in an epoch of the source that is over first; at least 1."""
        if epochs is None:
            self._mixture = Mixture(weights, lanes)
            period, slots = self._mixture.period, self._mixture.counts.tolist()
            spans = [n * period // (c * lanes) for n, c in zip(sizes, slots, strict=True) if c]
            self.lane_epoch = max(1, min(spans))
            self._orders = [
                SourceOrder(n, seed, name, lanes, block)
                for name, n in zip(names, sizes, strict=True)
            ]
            return
        if epochs <= 0 or len(set(weights)) != 1:
            raise ValueError(
                f"epochs={epochs} sees every sample equally often: it must be > 0 and the weights "
                f"equal, got {dict(zip(names, weights, strict=True))}; use max_steps with weights."
            )
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._orders = [SourceOrder(int(self._starts[-1]), seed, "", lanes, block)]
        self.total = round(epochs * int(self._starts[-1]))
        self.lane_epoch = max(1, int(self._starts[-1]) // lanes)

    def length(self, lane: int) -> int | None:
        """Samples of a lane, or None where it is endless."""
        if self.total is None:
            return None
        return max(0, -(-(self.total - lane) // self.lanes))

    def __call__(self, lane: int, times: Sequence[int]) -> list[SampleRef]:
        """The samples at these times of a lane."""
        t = np.asarray(times, np.int64)
        if self.total is None:
            source, k = self._mixture(lane, t)
            epoch, index = np.empty_like(t), np.empty_like(t)
            for s in np.unique(source):
                here = source == s
                epoch[here], index[here] = self._orders[s](k[here])
        else:
            epoch, place = self._orders[0](t * self.lanes + lane)
            source = np.searchsorted(self._starts, place, side="right") - 1
            index = place - self._starts[source]
        rows = zip(source.tolist(), epoch.tolist(), index.tolist(), t.tolist(), strict=True)
        return [SampleRef(self.names[s], e, i, j * self.lanes + lane) for s, e, i, j in rows]
