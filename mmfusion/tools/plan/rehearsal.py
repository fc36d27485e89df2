"""Optimizer steps of a recipe on tensors without values: what they keep in memory, what they
compute. The model, its objectives and the optimizer are the recipe's own and run their own code, so
gradient checkpointing, autocast, chunks of the loss, adapters and generators count as they are.

The order is Lightning's: the forward pass of a step runs while the gradients of the step before are
still there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmfusion.models.llms import attention
from mmfusion.objectives.base import Objective
from mmfusion.tools.plan.tracing import BACKWARD, FORWARD, STEP, Trace
from mmfusion.training.module import MultimodalModule
from mmfusion.types import Batch, Captions

LOSS = "objectives"
"""The part that objectives and the LLM's output head are charged to."""
PRECISIONS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Rehearsal:
    """What was seen, in bytes of one process that holds everything.

    Attributes:
        peak: largest sum of activations and gradients.
        activations: largest sum of what is neither weight, gradient nor optimizer state.
        by_part: those, by the part that made them; ``backward`` is what the backward pass makes.
        gradients: of everything that trains.
        optimizer: what the optimizer keeps between steps.
        step: what it takes besides while it steps.
        flat_step: the same, were all that trains one tensor.
        casts: of the activations, autocast's copies of weights in half precision.
        flops: by (phase, part), mean of the micro-batches; phases are ``forward``, ``backward`` and
            ``recompute`` (gradient checkpointing).
    """

    peak: int
    activations: int
    by_part: Mapping[str, int]
    gradients: int
    optimizer: int
    step: int
    flat_step: int
    casts: int
    flops: Mapping[tuple[str, str], float]

    def work(self, *phases: str) -> float:
        """FLOPs of a micro-batch in these phases."""
        return sum(flops for (phase, _), flops in self.flops.items() if phase in phases)


def rehearse(
    module: MultimodalModule,
    batches: Sequence[Batch],
    precision: str = "32-true",
    accumulates: bool = False,
    on_gpu: bool = True,
) -> Rehearsal:
    """Train on micro-batches without values.

    Args:
        module: built on the meta device, its tuning applied; it is of no use afterwards.
        batches: micro-batches, of which the one that needs most tells the memory.
        precision: ``trainer.precision``.
        accumulates: whether a step has several micro-batches.
        on_gpu: take the ways through attention and optimizer that a GPU takes.

    Raises:
        ValueError: where a part cannot run without values.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    known = _without_values(module, fakes)
    module.train()
    trace = Trace(fakes, [*known.values()])
    passes = _Passes(module, trace, PRECISIONS.get(precision), accumulates)
    with warnings.catch_warnings(), _as_on_gpu(on_gpu), trace.parts(_names(module)), fakes, trace:
        warnings.simplefilter("ignore")
        try:
            optimizer = _optimizer(module, known, on_gpu)
            passes.micro_batch(batches[0])
            _, kept = passes.step(optimizer)
            trace.flops.clear()
            seen = [passes.micro_batch(batch) for batch in batches]
            step, _ = passes.step(optimizer)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise ValueError(
                f"{trace.entered} cannot run without values "
                f"({type(error).__name__}: {str(error).splitlines()[0]}). Expected: a forward pass "
                "that reads no fraction in the middle. Do this: `mmfusion describe` tells the "
                "weights; try the recipe for two steps on one GPU for the rest."
            ) from error
    most = max(seen, key=lambda one: one.activations)
    return Rehearsal(
        peak=max(one.peak for one in seen) - kept,
        activations=most.activations - kept,
        by_part={part: size for part, size in most.by_part.items() if size > 0 and part != STEP},
        gradients=trace.gradients,
        optimizer=kept,
        step=step,
        flat_step=round(step * _all_at_once(optimizer)),
        casts=most.casts,
        flops={key: count / len(batches) for key, count in trace.flops.items()},
    )


@dataclass(frozen=True)
class _Seen:
    peak: int
    activations: int
    by_part: Mapping[str, int]
    casts: int


class _Passes:
    """Forward, backward and optimizer steps of one module."""

    def __init__(
        self,
        module: MultimodalModule,
        trace: Trace,
        dtype: torch.dtype | None,
        accumulates: bool,
    ) -> None:
        self.module, self.trace, self.dtype, self.accumulates = module, trace, dtype, accumulates
        self.trains = [p for p in module.model.parameters() if p.requires_grad]
        self._have: set[nn.Parameter] = set()
        for parameter in self.trains:
            parameter.register_post_accumulate_grad_hook(self._has_gradient)

    def _has_gradient(self, parameter: Any) -> None:
        if parameter not in self._have:
            self._have.add(parameter)
            self.trace.gradients += parameter.grad.numel() * parameter.grad.element_size()

    def micro_batch(self, batch: Batch) -> _Seen:
        """Forward and backward; gradients of before go in between, as Lightning has it."""
        trace = self.trace
        trace.restart()
        trace.phase = FORWARD
        given = _without_fractions(batch)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            loss = _loss(self.module, given)
        if not self.accumulates:
            for parameter in self.trains:
                parameter.grad = None
            self._have.clear()
            trace.gradients = 0
        casts = trace.casts
        trace.phase = BACKWARD
        loss.backward()
        return _Seen(trace.peak, trace.besides, trace.by_part, casts)

    def step(self, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        """What a step takes while it runs, and what of that it keeps."""
        trace = self.trace
        trace.restart()
        trace.phase = STEP
        before = trace.live
        optimizer.step()
        return trace.peak - before, trace.live - before


def _loss(module: MultimodalModule, batch: Batch) -> Tensor:
    """As :meth:`MultimodalModule.training_step` sums it."""
    objectives = cast(dict[str, Objective], dict(module.objectives.items()))
    for objective in objectives.values():
        objective.begin_step(module.model, batch)
    output = module.model(batch)
    losses = [one.weight * one(module.model, output, batch).total for one in objectives.values()]
    return torch.stack(losses).sum() + output.idle


def _without_values(module: MultimodalModule, fakes: FakeTensorMode) -> dict[Tensor, Tensor]:
    """Give a module made on the meta device fake weights, as if on a CPU; these by those."""
    made: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for names in (part._parameters, part._buffers):
            for name, old in cast(dict[str, Any], names).items():
                if old is None:
                    continue
                if old not in made:
                    made[old] = _without_value(old, fakes)
                names[name] = made[old]  # type: ignore[assignment]
    return made


def _without_value(old: Tensor, fakes: FakeTensorMode) -> Tensor:
    if not old.is_floating_point():
        return torch.zeros(old.shape, dtype=old.dtype)  # places in a table: they are read
    with fakes:
        new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _without_fractions(batch: Batch) -> Batch:
    """The batch with its media and targets without values; call under the modes."""

    def fake(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.empty(x.shape, dtype=x.dtype) if x.is_floating_point() else x
            for name, x in tensors.items()
        }

    return replace(
        batch,
        media={m: replace(x, tensors=fake(x.tensors)) for m, x in batch.media.items()},
        targets={m: replace(x, tensors=fake(x.tensors)) for m, x in batch.targets.items()},
        step_captions={
            m: Captions(x.captions, fake(x.tensors)) for m, x in batch.step_captions.items()
        },
    )


def _names(module: MultimodalModule) -> dict[nn.Module, str]:
    """The part of each module."""
    model = module.model
    names = {own: name for name, part in model.parts() for own in part.modules()}
    names |= dict.fromkeys(model.llm.head.modules(), LOSS)
    return names | dict.fromkeys(module.objectives.values(), LOSS)


def _optimizer(
    module: MultimodalModule, known: Mapping[Tensor, Tensor], on_gpu: bool
) -> torch.optim.Optimizer:
    groups = [{**group, "params": [known[p] for p in group["params"]]} for group in module.groups]
    optimizer = module.make_optimizer(groups)
    for group in optimizer.param_groups:
        if on_gpu and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # torch's choice there
    return optimizer


def _all_at_once(optimizer: torch.optim.Optimizer) -> float:
    """How many times the largest weight all are together, where each is stepped by itself."""
    numbers = [p.numel() for group in optimizer.param_groups for p in group["params"]]
    together = all(group.get("foreach") for group in optimizer.param_groups)
    return 1.0 if together else sum(numbers) / max(numbers)


@contextmanager
def _as_on_gpu(on_gpu: bool) -> Iterator[None]:
    """Short samples too go through the kernel, not through products of all pairs."""
    short = attention.SHORT
    attention.SHORT = 0 if on_gpu else short
    try:
        yield
    finally:
        attention.SHORT = short
