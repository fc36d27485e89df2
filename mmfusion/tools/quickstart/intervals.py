"""Bootstrap intervals of means and of differences per token, over held-out concepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

DRAWS = 4000


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    Attributes:
        value: the figure.
        low, high: the interval's ends.
        bound: what the figure must reach, or None.
    """

    value: float
    low: float
    high: float
    bound: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the figure reaches its bound (None without one)."""
        return None if self.bound is None else self.value >= self.bound

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reached": self.reached}


def ratio(
    totals: Sequence[float] | np.ndarray,
    counts: Sequence[float] | np.ndarray,
    clusters: Sequence[str],
    bound: float | None = None,
    seed: int = 0,
) -> Estimate:
    """Sum of ``totals`` over sum of ``counts`` (a loss per token, a share of right answers).

    Whole clusters are drawn with replacement: samples of one concept (the same caption spoken in
    four languages) are no independent observations, and single samples would give an interval that
    is too narrow.

    Args:
        totals: (S,) one term a sample.
        counts: (S,) its weight; tokens, or ones.
        clusters: (S,) the concept of each sample.
        bound: what the figure must reach.
        seed: of the draws.
    """
    if not len(clusters):
        raise ValueError("no samples to measure; the held-out data set is empty")
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    size = int(index.max()) + 1
    sums = np.bincount(index, weights=np.asarray(totals, dtype=np.float64), minlength=size)
    weights = np.bincount(index, weights=np.asarray(counts, dtype=np.float64), minlength=size)
    draws = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=DRAWS)
    values = (draws @ sums) / np.maximum(draws @ weights, 1e-12)
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(float(sums.sum() / weights.sum()), float(low), float(high), bound)
