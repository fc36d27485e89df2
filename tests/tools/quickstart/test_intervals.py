import numpy as np
import pytest

from mmfusion.tools.quickstart.intervals import Estimate, ratio


def slow_interval(totals, counts, clusters, draws=3000):
    """Draw whole clusters one by one and add up their samples."""
    rng = np.random.default_rng(7)
    names = sorted(set(clusters))
    values = []
    for _ in range(draws):
        total = count = 0.0
        for name in rng.choice(names, size=len(names)):
            for value, weight, cluster in zip(totals, counts, clusters, strict=True):
                if cluster == name:
                    total, count = total + value, count + weight
        values.append(total / count)
    return np.quantile(values, [0.025, 0.975])


def test_interval_equals_a_slow_bootstrap_over_clusters():
    rng = np.random.default_rng(0)
    clusters = [f"c{n // 3}" for n in range(30)]
    counts = rng.integers(2, 9, 30)
    totals = counts * (1 + np.repeat(rng.normal(size=10), 3)) + rng.normal(size=30)
    estimate = ratio(totals, counts, clusters)
    low, high = slow_interval(totals, counts, clusters)
    assert estimate.value == pytest.approx(totals.sum() / counts.sum())
    assert estimate.low == pytest.approx(low, abs=0.06)
    assert estimate.high == pytest.approx(high, abs=0.06)


def test_repeated_samples_of_a_concept_do_not_narrow_the_interval():
    rng = np.random.default_rng(1)
    values = rng.normal(size=20)
    names = [str(n) for n in range(20)]
    once = ratio(values, np.ones(20), names)
    four = ratio(np.tile(values, 4), np.ones(80), names * 4)
    assert (four.low, four.high) == pytest.approx((once.low, once.high))


def test_bound_is_reached_by_the_figure_itself():
    assert Estimate(0.5, 0.4, 0.6, 0.5).as_dict()["reached"] is True
    assert Estimate(0.49, 0.4, 0.6, 0.5).as_dict()["reached"] is False
    assert Estimate(0.5, 0.4, 0.6).as_dict()["reached"] is None


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="no samples"):
        ratio([], [], [])
