"""Memory by strategy against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mmfusion.tools.plan.memory import RESERVED, alone, ddp, fsdp2, strategies, zero
from mmfusion.tools.plan.rehearsal import Rehearsal
from mmfusion.tools.plan.sizes import Sizes

# 1000 numbers train in fp32, 600 of them in the LLM's layers; 2000 are frozen in bfloat16, 1800 of
# them in the LLM: 1500 in its two layers, 300 in its embeddings (its head is the same).
SIZES = Sizes(
    trained=4000,
    frozen=4000,
    trained_divided=2400,
    frozen_divided=3600,
    frozen_outside=400,
    layers=5400,
    layer=2700,
    number=1000,
    number_divided=2400,
    number_layer=1050,
)
# 5000 bytes of activations; the optimizer keeps 8 bytes a number, and takes 4 more in its step.
SEEN = Rehearsal(
    peak=8500, activations=5000, by_part={}, gradients=4000, optimizer=8000, step=4000,
    flat_step=4000, casts=700, flops={},
)  # fmt: skip
SMALL = {"reduce_bucket_size": 100}


def parts(memory):
    return (
        memory.parameters,
        memory.frozen,
        memory.gradients,
        memory.optimizer,
        memory.activations,
        memory.transient,
    )


def test_one_process_holds_everything_at_the_moment_that_takes_most():
    # Activations are 4500 when they and all gradients together are most (8500).
    assert parts(alone(SIZES, SEEN)) == (4000, 4000, 4000, 8000, 4500, 0)
    assert alone(SIZES, SEEN).total == 4000 + 4000 + 8000 + 8500


def test_a_step_that_takes_more_than_the_backward_pass_counts():
    seen = Rehearsal(4100, 100, {}, 4000, 8000, 4000, 4000, 0, {})
    found = alone(SIZES, seen)
    assert found.total == 4000 + 4000 + 4000 + 8000 + 4000  # weights, frozen, grads, state, step
    assert found.transient == 3900


def test_ddp_sends_a_copy_of_the_gradients():
    assert ddp(SIZES, SEEN, 1).transient == 0
    assert ddp(SIZES, SEEN, 8).transient == 4000


def test_stage_1_divides_the_optimizer_and_keeps_a_copy_of_its_share():
    # 4000 + 4000/4 of a copy; 8000/4 of state; two buckets of 100 numbers.
    assert parts(zero(1, SIZES, SEEN, 4, options=SMALL)) == (5000, 4000, 4000, 2000, 5000, 800)


def test_stage_2_divides_gradients_too():
    assert parts(zero(2, SIZES, SEEN, 4, options=SMALL)) == (5000, 4000, 1000, 2000, 5000, 800)


def test_stage_3_divides_the_llm():
    # Trained: 1600 outside the LLM whole, a quarter of all 4000, and its copy that is stepped.
    # Frozen: 400 outside, and a quarter of 3600. All 6000 bytes of the LLM are gathered, out of as
    # many in one tensor; one bucket.
    assert parts(zero(3, SIZES, SEEN, 4, options=SMALL)) == (
        1600 + 2 * 1000, 400 + 900, 1000, 2000, 5000, 2 * 6000 + 400,
    )  # fmt: skip


def test_stage_3_gathers_no_more_than_it_may():
    # A quarter of the LLM, a tenth of it ahead.
    few = {"stage3_max_live_parameters": "6e2", "stage3_prefetch_bucket_size": 240}
    assert zero(3, SIZES, SEEN, 4, options=SMALL | few).transient == 1500 + 600 + 400


def test_zero_steps_a_share_as_one_tensor():
    """The step counts where there are no activations: flat gradients, then what Adam takes."""
    seen = replace(SEEN, activations=0, step=40, flat_step=9600)
    # A share is 1000 bytes, Adam's 2400. Stage 1 has 4000 of gradients, which are gone by then.
    assert zero(1, SIZES, seen, 4, options=SMALL).transient == 1000
    assert zero(2, SIZES, seen, 4, options=SMALL).transient == 2400
    small = {**SMALL, "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
    assert zero(3, SIZES, seen, 4, options=small).transient == 1000 + 2400  # its buffer stays


def test_offloading_moves_the_state_to_the_host():
    two = zero(2, SIZES, SEEN, 4, offload=True, options=SMALL)
    assert parts(two) == (4000, 4000, 0, 0, 5000, 800)
    assert two.host == 2000 + 3 * 1000  # state; flat share, its gradients, a buffer
    three = zero(3, SIZES, SEEN, 4, offload=True, options=SMALL)
    assert parts(three) == (1600, 400, 0, 0, 5000, 2 * 6000 + 400)
    # State; the copy that is stepped, its gradients, their buffer; a quarter of the LLM.
    assert three.host == 2000 + 3 * 1000 + 1500


def test_fsdp_divides_what_trains_and_the_llm():
    # Frozen: 400 outside, a quarter of 3600. Whole for a moment: what is in no layer (1600 that
    # train, 600 of embeddings), two layers of 2700, gradients of one.
    assert parts(fsdp2(SIZES, SEEN, 4)) == (1000, 1300, 1000, 2000, 5000, 2200 + 3 * 2700)
    # In bfloat16 two layers take 1050 x 2 each, and stand for autocast's copies.
    assert parts(fsdp2(SIZES, SEEN, 4, half=True)) == (
        1000, 1300, 1000, 2000, 4300, 2200 + 2 * 2100 + 2700,
    )  # fmt: skip


def test_fsdp_on_one_gpu_divides_and_gathers_nothing():
    assert parts(fsdp2(SIZES, SEEN, 1)) == (4000, 4000, 4000, 8000, 5000, 0)


def test_offloaded_fsdp_has_its_shares_on_the_host():
    # Shares of weights, frozen ones, gradients, state and step; the layers are gathered all the
    # same, and with two of them gathered for good both are there (5400 and 2700 of gradients).
    assert parts(fsdp2(SIZES, SEEN, 4, offload=True)) == (0, 400, 0, 0, 5000, 2200 + 3 * 2700)
    assert fsdp2(SIZES, SEEN, 4, offload=True).host == 1000 + 900 + 1000 + 2000 + 1000
    assert fsdp2(SIZES, SEEN, 4, reshard=False).transient == 2200 + 5400 + 2700


def test_a_divided_encoder_that_gathers_more_than_layers_counts():
    sizes = replace(SIZES, frozen=54000, parts=50000, gathered_part=20000)
    assert fsdp2(sizes, SEEN, 4).transient == 2200 + 20000


def test_an_adam_of_seven_billion_takes_sixteen_bytes_a_number():
    """bf16-mixed full tuning of 7e9 numbers: weights, gradients 4 bytes each, state 8; ZeRO's
    copy 4 more.
    """
    n = 7 * 10**9
    sizes = Sizes(trained=4 * n, frozen=0, trained_divided=4 * n, number=n, number_divided=n)
    seen = Rehearsal(4 * n, 0, {}, 4 * n, 8 * n, 0, 0, 0, {})
    assert ddp(sizes, seen, 1).total == 16 * n
    three = zero(3, sizes, seen, 8)
    assert three.parameters + three.gradients + three.optimizer == 20 * n // 8


def test_what_fits_leaves_room_for_cuda():
    memory = alone(SIZES, SEEN)
    assert memory.fits(memory.total + RESERVED)
    assert not memory.fits(memory.total + RESERVED - 1)


def test_all_strategies_are_planned():
    assert [memory.strategy for memory in strategies(SIZES, SEEN, 8)] == [
        "ddp", "deepspeed_1", "deepspeed_2", "deepspeed_3", "deepspeed_2_offload",
        "deepspeed_3_offload", "fsdp2",
    ]  # fmt: skip


@pytest.mark.parametrize("world", [2, 3, 7])
def test_shares_are_rounded_up(world):
    assert zero(2, SIZES, SEEN, world, options=SMALL).optimizer * world >= SEEN.optimizer
