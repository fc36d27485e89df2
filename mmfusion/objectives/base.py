"""The objective: one loss a file, as a sum over its terms and their number, so that any split of a
batch adds up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.generators.base import Generator
from mmfusion.types import Batch, ConditioningSpec, ModelOutput, TargetBatch


@dataclass
class Loss:
    """A loss before normalisation.

    Attributes:
        total: () sum over the terms, with a graph.
        count: () int64 number of terms in this micro-batch.
        per_sample: (S,) detached sum over the terms of each of ``batch.samples``.
        per_sample_count: (S,) int64.
    """

    total: Tensor
    count: Tensor
    per_sample: Tensor
    per_sample_count: Tensor


class Objective(nn.Module, ABC):
    """One loss. The module divides ``total`` by the step's global number of terms and multiplies
    ``weight``.

    Attributes:
        weight: of this loss in the sum.
        unit: what its terms are: supervised ``tokens``, or targets of a modality.
    """

    weight: float
    unit: str = "tokens"

    def begin_step(self, model: AnyToAnyModel, batch: Batch) -> None:
        """Called with the first micro-batch of each optimizer step, on every rank, before any loss
        of it: what depends on the whole step is made here, with the collectives that it needs.
        """

    @abstractmethod
    def forward(self, model: AnyToAnyModel, output: ModelOutput, batch: Batch) -> Loss: ...


class TargetObjective(Objective):
    """A loss over the targets of one modality, by its generator.

    Args:
        modality: of the targets.
        weight: of this loss in the sum.

    Attributes:
        needs: parts of the generator that it runs. What no objective needs is not loaded.
        captions: whether its targets need a caption.
        step_captions: whether it reads ``Batch.step_captions``.
    """

    needs: frozenset[str] = frozenset()
    captions: bool = False
    step_captions: bool = False

    def __init__(self, modality: str, weight: float = 1.0) -> None:
        super().__init__()
        self.modality = self.unit = modality
        self.weight = weight

    def check(self, generator: Generator, given: ConditioningSpec) -> None:
        """Called before anything is loaded.

        Args:
            generator: of the modality.
            given: what its output projector gives for a target.

        Raises:
            ValueError: where it cannot give this loss.
        """


def over_targets(losses_M: Tensor, target: TargetBatch, num_samples: int) -> Loss:
    """The sum over the targets of a modality. An idle one counts for nothing, but keeps its graph.

    Args:
        losses_M: (M,).
        target: on the host.
        num_samples: S.
    """
    count = 0 if target.idle else len(losses_M)
    per_sample = torch.zeros(num_samples, device=losses_M.device)
    per_count = torch.zeros(num_samples, dtype=torch.int64, device=losses_M.device)
    if count:
        segments = target.segments.to(losses_M.device, non_blocking=True)
        per_sample = per_sample.index_add(0, segments, losses_M.detach().float())
        per_count = per_count.index_add(0, segments, torch.ones_like(segments))
    return Loss(
        total=losses_M.sum(),
        count=torch.full((), count, device=losses_M.device),
        per_sample=per_sample,
        per_sample_count=per_count,
    )
