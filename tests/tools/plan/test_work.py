"""Time, checkpoints and their distance, worked out by hand."""

from __future__ import annotations

import pytest

from mmfusion.tools.plan.gpus import GPU
from mmfusion.tools.plan.rehearsal import Rehearsal
from mmfusion.tools.plan.sizes import Sizes
from mmfusion.tools.plan.tracing import BACKWARD, FORWARD, RECOMPUTE
from mmfusion.tools.plan.work import interval, work

SEEN = Rehearsal(
    peak=0,
    activations=0,
    by_part={},
    gradients=0,
    optimizer=8 * 10**9,
    step=0,
    flat_step=0,
    casts=0,
    flops={
        (FORWARD, "encoders.image"): 1e12,
        (FORWARD, "llm"): 4e12,
        (RECOMPUTE, "llm"): 4e12,
        (BACKWARD, "elsewhere"): 5e12,
    },
)
SIZES = Sizes(trained=4 * 10**9, frozen=0, number=10**9)


def test_a_run_of_ten_teraflops_a_micro_batch():
    gpu = GPU("made up", 0, 100e12)
    found = work(SEEN, SIZES, {"encoders.image"}, 32, 65536, 5400, gpu, gpus=8, mfu=0.5)
    assert (found.frozen, found.trained, found.backward) == (32e12, 128e12, 160e12)
    assert found.recompute == 128e12  # not in the MFU's sum
    assert found.flops == 320e12
    assert found.seconds == pytest.approx(320 / (8 * 100 * 0.5))  # 0.8 s
    assert found.days == pytest.approx(5400 * 0.8 / 86400)  # 0.05
    assert found.checkpoint == 12 * 10**9
    # 12 s of writing, a failure each 50,000 / 8 hours: 23,238 s apart, but an hour at most.
    assert interval(12 * 10**9, 8) == 3600
    assert found.every == 3600 / 0.8
    assert work(SEEN, SIZES, set(), 32, 65536, 100, gpu, gpus=8, mfu=0.5).every == 100
    assert work(SEEN, SIZES, set(), 32, 65536, None, gpu, gpus=8, mfu=0.5).days is None


def test_more_gpus_fail_more_often():
    # 16,384 GPUs, 12 s of writing: sqrt(2 x 12 x 50,000 x 3600 / 16,384) = 513 s.
    assert interval(12 * 10**9, 16384) == pytest.approx(513.5, abs=0.1)
    assert interval(10**6, 10**6) == 60
