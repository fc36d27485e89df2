import math

import pytest
import torch

from mmfusion.training.schedules import WarmupCosine


def test_rates_rise_over_the_warmup_and_fall_along_half_a_cosine():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 2.0}])
    scheduler = WarmupCosine(warmup_steps=4, final_ratio=0.1)(optimizer, 20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [2 * (i + 1) / 4 for i in range(4)]
    expected += [
        2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (i - 4) / (19 - 4)))) for i in range(4, 20)
    ]
    assert rates == pytest.approx(expected)
    assert rates[-1] == pytest.approx(0.2)


def test_warmup_defaults_to_three_percent():
    assert WarmupCosine().factor(0, 1000) == pytest.approx(1 / 30)
    assert WarmupCosine().factor(29, 1000) == 1.0


@pytest.mark.parametrize(
    ("schedule", "total", "named"),
    [
        (WarmupCosine(), -1, "trainer.max_steps"),
        (WarmupCosine(warmup_steps=30), 20, "warmup_steps"),
    ],
)
def test_a_run_without_an_end_or_shorter_than_its_warmup_is_refused(schedule, total, named):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=named):
        schedule(optimizer, total)
