"""The objective: one loss a file, as a sum over its terms and their number, so that any split of a
batch adds up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.types import Batch, ModelOutput


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
    """One loss. The module divides ``total`` by the step's global number of supervised tokens and
    multiplies ``weight``.
    """

    weight: float

    @abstractmethod
    def forward(self, model: AnyToAnyModel, output: ModelOutput, batch: Batch) -> Loss: ...
