"""The mean is over tokens, of each source and of all."""

from __future__ import annotations

import pytest
import torch

from mmfusion.metrics.token_loss import TokenLoss
from mmfusion.objectives.base import Loss
from mmfusion.types import BatchSample, SampleRef


def loss(sums: list[float], counts: list[int]) -> Loss:
    return Loss(
        torch.tensor(sum(sums)), torch.tensor(sum(counts)), torch.tensor(sums), torch.tensor(counts)
    )


def samples(*sources: str) -> list[BatchSample]:
    return [BatchSample(SampleRef(source, 0, 0), "", "") for source in sources]


def test_mean_is_over_tokens_of_all_batches() -> None:
    metric = TokenLoss(["a", "b", "never"])
    metric.update(loss([6.0, 1.0, 2.0], [3, 1, 1]), samples("a", "b", "a"))
    metric.update(loss([4.0], [4]), samples("b"))
    metric.update(loss([], []), [])
    assert metric.compute() == pytest.approx({"a": 8 / 4, "b": 5 / 5, "": 13 / 9})


def test_only_chosen_samples_count() -> None:
    metric = TokenLoss(["a"])
    metric.update(loss([6.0, 1.0], [3, 1]), samples("a", "a"), torch.tensor([True, False]))
    assert metric.compute() == {"a": 2.0, "": 2.0}
    empty = TokenLoss(["a"])
    assert empty.compute() == {}
