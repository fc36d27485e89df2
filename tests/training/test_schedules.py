import math

import pytest
import torch

from mmfusion.training.schedules import WarmupDecay


def test_rates_rise_over_the_warmup_and_fall_along_half_a_cosine():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 2.0}])
    scheduler = WarmupDecay(warmup_steps=4, final_ratio=0.1)(optimizer, 20)
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


def test_a_linear_decay_is_a_straight_line():
    schedule = WarmupDecay(warmup_steps=2, final_ratio=0.0, decay="linear")
    found = [schedule.factor(step, 7) for step in range(7)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_warmup_defaults_to_three_percent():
    assert WarmupDecay().factor(0, 1000) == pytest.approx(1 / 30)
    assert WarmupDecay().factor(29, 1000) == 1.0


@pytest.mark.parametrize(
    ("schedule", "total", "named"),
    [
        (WarmupDecay(), -1, "trainer.max_steps"),
        (WarmupDecay(warmup_steps=30), 20, "warmup_steps"),
    ],
)
def test_a_run_without_an_end_or_shorter_than_its_warmup_is_refused(schedule, total, named):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=named):
        schedule(optimizer, total)
