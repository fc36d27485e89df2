"""The judge: figures of media that were made, beside what they should have been."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import nn
from torchmetrics import Metric

from mmfusion.types import Media


class Judge(nn.Module, ABC):
    """Scores the media of one modality. The constructor reads no weights; ``build`` does.

    Sums are kept in torchmetrics' metrics as submodules, so that :meth:`compute` is over all ranks:
    every rank calls it, also one that had nothing to judge.

    Attributes:
        modality: of the media it can judge; None: it says so only when it sees them.
    """

    modality: str | None = None

    def build(self) -> None:
        """Load what it judges by."""

    @abstractmethod
    def update(self, made: Sequence[Media], wanted: Sequence[Media]) -> None:
        """Add media.

        Args:
            made: at least one.
            wanted: for each, the true medium, with its ``caption`` where the data have one.
        """

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Its figures by name; none where there was too little to judge."""

    def reset(self) -> None:
        """Begin anew."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def train(self, mode: bool = True) -> Judge:
        """It only ever judges."""
        return super().train(False)
