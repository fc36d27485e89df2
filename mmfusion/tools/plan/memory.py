"""Memory of one GPU under each strategy, by formula from what one process took in the rehearsal.

W ranks; all in bytes. A strategy changes where weights, gradients and optimizer state are, and what
is gathered or sent; activations are those of one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mmfusion.tools.plan.rehearsal import Rehearsal
from mmfusion.tools.plan.sizes import Sizes

FP32 = 4
RESERVED = 1 << 30
"""Bytes of a GPU that are no tensors: CUDA's context, NCCL's buffers, workspaces of kernels."""
BUCKET = 200_000_000
"""Numbers of a bucket of gradients (``reduce_bucket_size`` of Lightning's DeepSpeedStrategy)."""
LIVE = 1_000_000_000
"""Gathered numbers that ZeRO stage 3 keeps at most (``max_live_parameters`` there)."""
PREFETCH = 50_000_000
"""Numbers that it gathers at a time, ahead of their use (``stage3_prefetch_bucket_size``)."""
COUNTED = ("reduce_bucket_size", "stage3_max_live_parameters", "stage3_prefetch_bucket_size")
"""Fields of ``zero_optimization`` that formulas here take."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, at the moment that takes most.

    Attributes:
        strategy: its name.
        parameters: weights that train, with a strategy's own copies of them.
        frozen: weights that do not.
        gradients: that stay until the step.
        optimizer: state between steps.
        activations: what the backward pass needs, with its own tensors.
        transient: buckets, gathered weights, and what the optimizer's step takes beyond the others.
        host: of the machine's own memory, for each GPU, where something is offloaded.
        refused: what the strategy says of the recipe at its start, where it does not take it.
    """

    strategy: str
    parameters: int
    frozen: int
    gradients: int
    optimizer: int
    activations: int
    transient: int
    host: int = 0
    refused: str = ""

    @property
    def total(self) -> int:
        """All of it, on the GPU."""
        return (
            self.parameters
            + self.frozen
            + self.gradients
            + self.optimizer
            + self.activations
            + self.transient
        )

    def fits(self, memory: int) -> bool:
        """Into a GPU of so many bytes, and starts."""
        return not self.refused and self.total + RESERVED <= memory


def alone(sizes: Sizes, seen: Rehearsal) -> Memory:
    """One process, no strategy."""
    activations = seen.peak - seen.gradients
    return Memory(
        "none",
        parameters=sizes.trained,
        frozen=sizes.frozen,
        gradients=seen.gradients,
        optimizer=seen.optimizer,
        activations=activations,
        transient=max(0, seen.step - activations),
    )


def ddp(sizes: Sizes, seen: Rehearsal, world: int) -> Memory:
    """As one process; the buckets that gradients are sent in are a copy of them."""
    one = alone(sizes, seen)
    return replace(
        one, strategy="ddp", transient=one.transient + (seen.gradients if world > 1 else 0)
    )


def zero(
    stage: int,
    sizes: Sizes,
    seen: Rehearsal,
    world: int,
    offload: bool = False,
    options: Mapping[str, object] | None = None,
) -> Memory:
    """DeepSpeed's ZeRO as :class:`mmfusion.training.strategies.zero.ZeRO` sets it up: what trains
    in fp32, frozen parts whole but for the LLM in stage 3.

    Args:
        stage: 1 divides the optimizer's state, 2 gradients too, 3 the LLM's weights too.
        sizes: of the weights.
        seen: in the rehearsal.
        world: ranks.
        offload: the optimizer's state (and in stage 3 what is divided) is in the host's memory.
        options: fields of ``zero_optimization`` that differ from Lightning's.
    """
    given = {**dict(zip(COUNTED, (BUCKET, LIVE, PREFETCH), strict=True)), **(options or {})}
    bucket = _number(given["reduce_bucket_size"]) * FP32
    share = -(-sizes.number * FP32 // world)  # of what trains
    state = -(-seen.optimizer // world)
    if stage < 3:
        # The flat share that the optimizer steps is a copy; two buckets are filled in turn.
        parameters, frozen = sizes.trained + (0 if offload else share), sizes.frozen
        buckets, gathered = 2 * bucket, 0
        host = state + 3 * share if offload else 0  # with the flat share, its gradients, a buffer
    else:
        divided = sizes.trained_divided + sizes.frozen_divided
        part = 0 if offload else -(-divided // world)
        outside = sizes.trained - sizes.trained_divided
        part_trained = 0 if offload else -(-sizes.trained_divided // world)
        # What is whole has a share besides. The optimizer steps a copy of all shares: DeepSpeed
        # would do without where they are fp32, but takes them to be on another device (it compares
        # its name with a torch.device).
        parameters = outside + (0 if offload else -(-outside // world) + part_trained + share)
        frozen = sizes.frozen - sizes.frozen_divided + part - part_trained
        # What is gathered ahead comes in one tensor, of which the weights are copies.
        live = _number(given["stage3_max_live_parameters"])
        ahead = _number(given["stage3_prefetch_bucket_size"])
        of_all = max(1, sizes.number_divided)
        gathered = round(divided * (min(1.0, live / of_all) + min(1.0, ahead / of_all)))
        buckets = bucket
        # The copy, its gradients, and the buffer that these are reduced into.
        host = state + 3 * share - (-divided // world) if offload else 0
    gradients = sizes.number * FP32 if stage == 1 else 0 if offload else share
    # The step: gradients of the share laid flat, and what the optimizer takes for it, one tensor.
    # Stages 1 and 2 have given the gradients away by then, stage 3 keeps their buffer.
    freed = gradients if stage < 3 else 0
    step = 0 if offload else max(share, share + -(-seen.flat_step // world) - freed)
    return Memory(
        f"deepspeed_{stage}" + ("_offload" if offload else ""),
        parameters=parameters,
        frozen=frozen,
        gradients=gradients,
        optimizer=0 if offload else state,
        activations=seen.activations,
        transient=max(buckets + gathered, step - seen.activations),
        host=host,
    )


def fsdp2(
    sizes: Sizes,
    seen: Rehearsal,
    world: int,
    half: bool = False,
    offload: bool = False,
    reshard: bool = True,
) -> Memory:
    """PyTorch's FSDP2 as :class:`mmfusion.training.strategies.fsdp2.FSDP2` sets it up: what trains
    and the LLM are divided, other frozen parts whole. A layer is gathered while the one before it
    runs; what is in no layer is whole during a step.

    Args:
        sizes: of the weights.
        seen: in the rehearsal.
        world: ranks that a weight is divided among.
        half: layers are gathered in bfloat16, in place of autocast's copies.
        offload: what is divided is in the host's memory, and steps there.
        reshard: a layer is given away after its forward pass.
    """
    layer = sizes.number_layer * 2 if half else sizes.layer
    layers = sizes.number_layers * 2 if half else sizes.layers
    rest = sizes.trained + sizes.frozen - sizes.frozen_outside - sizes.parts - sizes.layers
    # On their way: gradients of a layer, or of what is in none.
    sent = max(sizes.layer if sizes.trained_divided else 0, sizes.trained - sizes.trained_divided)
    activations = seen.activations - (seen.casts if half and world > 1 else 0)
    # Divided encoders and denoisers run while no layer of the LLM is gathered.
    running = max((2 * layer if reshard else layers) + sent, sizes.gathered_part)
    gathered = rest + running if world > 1 or offload else 0
    parameters, optimizer = -(-sizes.trained // world), -(-seen.optimizer // world)
    frozen = -(-(sizes.frozen - sizes.frozen_outside) // world)
    gradients, step = -(-seen.gradients // world), -(-seen.step // world)
    away = parameters + frozen + gradients + optimizer + step
    return Memory(
        "fsdp2",
        parameters=0 if offload else parameters,
        frozen=sizes.frozen_outside + (0 if offload else frozen),
        gradients=0 if offload else gradients,
        optimizer=0 if offload else optimizer,
        activations=activations,
        transient=max(gathered, 0 if offload else step - activations),
        host=away if offload else 0,
    )


def strategies(sizes: Sizes, seen: Rehearsal, world: int, half: bool = False) -> list[Memory]:
    """All of them, by one word each. Arguments are those of :func:`zero` and :func:`fsdp2`."""
    made = [(stage, offload) for offload in (False, True) for stage in (1, 2, 3)]
    return [
        ddp(sizes, seen, world),
        *(zero(s, sizes, seen, world, o) for s, o in made if (s, o) != (1, True)),
        fsdp2(sizes, seen, world, half),
    ]


def _number(value: object) -> int:
    return int(float(str(value)))
