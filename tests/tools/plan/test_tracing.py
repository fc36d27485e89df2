"""What a pass without values would allocate and compute, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mmfusion.tools.plan.tracing import BACKWARD, FORWARD, Trace


@pytest.fixture
def fakes():
    return FakeTensorMode(allow_non_fake_inputs=True)


def test_memory_is_what_is_held(fakes):
    with fakes, Trace(fakes, []) as trace:
        a = torch.empty(1000, 500)
        b = a + 1
        assert trace.live == 4_000_000
        c = b.T[3:]  # a view takes nothing
        del b
        assert trace.live == 4_000_000
        del a, c
        assert trace.live == 0
        assert trace.peak == 4_000_000


def test_weights_that_were_there_do_not_count(fakes):
    with fakes:
        weight = torch.empty(500, 500)
    with fakes, Trace(fakes, [weight]) as trace:
        _ = weight.T @ weight
        assert trace.peak == 1_000_000
    assert trace.flops.total() == 2 * 500**3


def test_a_backward_pass_keeps_what_it_needs(fakes):
    with fakes:
        layers = nn.Sequential(nn.Linear(100, 200, bias=False), nn.ReLU(), nn.Linear(200, 50))
    with fakes, Trace(fakes, [*layers.parameters()]) as trace:
        trace.phase = FORWARD
        x = torch.empty(1000, 100)
        y = layers(x)
        # x, the ReLU's output (also the last layer's input) and y; the first layer's output is
        # gone: ReLU is derived from its own output.
        assert trace.live == 4 * 1000 * (100 + 200 + 50)
        trace.phase = BACKWARD
        y.sum().backward()
    forward = 2 * 1000 * (100 * 200 + 200 * 50)
    weights = 2 * 1000 * (100 * 200 + 200 * 50)  # gradients of the weights
    inputs = 2 * 1000 * 200 * 50  # x needs none
    assert {phase: n for (phase, _), n in trace.flops.items()} == {
        FORWARD: forward,
        BACKWARD: weights + inputs,
    }


def test_whole_numbers_keep_their_values(fakes):
    with fakes, Trace(fakes, []):
        lengths = torch.tensor([2, 3])
        valid = torch.arange(4) < lengths[:, None]
        assert valid.sum() == 5
        picked = torch.empty(2, 4, 7000)[valid]
    assert isinstance(picked, FakeTensor)
    assert picked.shape == (5, 7000)
    assert not isinstance(valid, FakeTensor)


def test_what_parts_do_is_charged_to_them(fakes):
    with fakes:
        first, second = nn.Linear(10, 20), nn.Linear(20, 30)
    trace = Trace(fakes, [*first.parameters(), *second.parameters()])
    with trace.parts({first: "first", second: "second"}), fakes, trace:
        trace.phase = FORWARD
        _ = second(first(torch.empty(1000, 10)))
    assert trace.flops == {
        (FORWARD, "first"): 2 * 1000 * 200,
        (FORWARD, "second"): 2 * 1000 * 600,
    }
    assert trace.by_part["first"] == 4 * 1000 * 20
