"""Does the model answer with media, or aloud, when it should, and only then? Over all ranks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryStatScores

SPEECH = "speech"
"""Counted beside the modalities: an answer of which words are said aloud."""


class Emission(nn.Module):
    """Precision, recall and F1 of answering with a modality, counted over answers.

    Args:
        modalities: that the model makes, and :data:`SPEECH` where it speaks, in the same order on
            every rank.
    """

    def __init__(self, modalities: Sequence[str]) -> None:
        super().__init__()
        self.counts = nn.ModuleDict({name: BinaryStatScores() for name in modalities})

    def update(self, given: Sequence[Collection[str]], wanted: Sequence[Collection[str]]) -> None:
        """Add answers.

        Args:
            given: for each, the modalities it holds.
            wanted: those that the true answer holds.
        """
        for modality in self.counts:
            self._of(modality).update(_marks(given, modality), _marks(wanted, modality))

    def compute(self) -> dict[str, float]:
        """``precision/<modality>``, ``recall/...`` and ``f1/...``. What has nothing to divide by is
        left out: precision where no answer holds the modality, recall where none should, F1 where
        both.
        """
        figures = {}
        for modality in self.counts:
            right, wrong, _, missed, _ = self._of(modality).compute().tolist()
            for name, part, whole in (
                ("precision", right, right + wrong),
                ("recall", right, right + missed),
                ("f1", 2 * right, 2 * right + wrong + missed),
            ):
                if whole:
                    figures[f"{name}/{modality}"] = part / whole
        return figures

    def _of(self, modality: str) -> BinaryStatScores:
        return cast(BinaryStatScores, self.counts[modality])


def _marks(answers: Sequence[Collection[str]], modality: str) -> Tensor:
    return torch.tensor([modality in answer for answer in answers], dtype=torch.int64)
