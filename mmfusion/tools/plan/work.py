"""How much there is to compute, how long that takes, and how often to save."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmfusion.tools.plan.gpus import GPU
from mmfusion.tools.plan.rehearsal import Rehearsal
from mmfusion.tools.plan.sizes import Sizes
from mmfusion.tools.plan.tracing import BACKWARD, FORWARD, RECOMPUTE

GPU_HOURS_A_FAILURE = 50_000
"""Llama 3 405B: 419 unexpected interruptions of 16,384 GPUs in 54 days (arXiv:2407.21783, section
3.3.4)."""
BYTES_A_SECOND = 1e9
"""That a checkpoint is written with."""
LONGEST, SHORTEST = 3600.0, 60.0
"""Seconds between checkpoints."""


@dataclass(frozen=True)
class Work:
    """Of a run.

    Attributes:
        steps: optimizer steps; None where the run has no end.
        tokens: of an optimizer step, on all ranks, without padding.
        frozen: FLOPs of a step's forward pass through parts of which nothing trains.
        trained: FLOPs of its forward pass through the others.
        backward: FLOPs of its backward pass.
        recompute: FLOPs that gradient checkpointing does twice; not counted by the MFU.
        seconds: of a step at the MFU.
        checkpoint: bytes of a checkpoint: what trains or trained before, and the optimizer's state.
        every: steps between checkpoints that lose least time to writing and to failures.
    """

    steps: int | None
    tokens: float
    frozen: float
    trained: float
    backward: float
    recompute: float
    seconds: float
    checkpoint: int
    every: int

    @property
    def flops(self) -> float:
        """Of a step, as the MFU counts them."""
        return self.frozen + self.trained + self.backward

    @property
    def days(self) -> float | None:
        """Of the whole run."""
        return None if self.steps is None else self.steps * self.seconds / 86400


def work(
    seen: Rehearsal,
    sizes: Sizes,
    frozen_parts: set[str],
    micro_batches: float,
    tokens: float,
    steps: int | None,
    gpu: GPU,
    gpus: int,
    mfu: float,
    inherited: int = 0,
) -> Work:
    """Put together.

    Args:
        seen: in the rehearsal, of a micro-batch.
        sizes: of the weights.
        frozen_parts: names of parts of which nothing trains.
        micro_batches: of a step, on all ranks.
        tokens: of a step.
        steps: of the run.
        gpu: each of them.
        gpus: how many.
        mfu: share of the GPUs' peak that is used.
        inherited: bytes of earlier stages that checkpoints keep.
    """
    idle = sum(
        flops
        for (phase, part), flops in seen.flops.items()
        if phase == FORWARD and part in frozen_parts
    )
    flops = seen.work(FORWARD, BACKWARD) * micro_batches
    seconds = flops / (gpus * gpu.flops * mfu)
    checkpoint = sizes.trained + seen.optimizer + inherited
    every = round(interval(checkpoint, gpus) / seconds) if seconds else 1
    return Work(
        steps=steps,
        tokens=tokens,
        frozen=idle * micro_batches,
        trained=(seen.work(FORWARD) - idle) * micro_batches,
        backward=seen.work(BACKWARD) * micro_batches,
        recompute=seen.work(RECOMPUTE) * micro_batches,
        seconds=seconds,
        checkpoint=checkpoint,
        every=max(1, min(every, steps or every)),
    )


def interval(checkpoint: int, gpus: int) -> float:
    """Seconds between checkpoints, ``sqrt(2 x seconds of one x seconds between failures)`` (J. W.
    Young, 1974), within a minute and an hour.
    """
    writing = checkpoint / BYTES_A_SECOND
    failures = GPU_HOURS_A_FAILURE * 3600 / gpus
    return min(LONGEST, max(SHORTEST, math.sqrt(2 * writing * failures)))
