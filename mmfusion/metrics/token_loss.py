"""Loss per supervised token by source, summed over batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from mmfusion.objectives.base import Loss
from mmfusion.types import BatchSample


class TokenLoss(Metric):
    """Token-weighted mean loss of each source.

    Args:
        sources: their names, in the same order on every rank.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, sources: Sequence[str]) -> None:
        super().__init__()
        self.sources = list(sources)
        for name in ("total", "count"):
            self.add_state(name, torch.zeros(len(self.sources)), dist_reduce_fx="sum")

    def update(
        self, loss: Loss, samples: Sequence[BatchSample], chosen: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            loss: of the batch.
            samples: where each of its S samples comes from.
            chosen: (S,) bool, the samples to count; None counts all.
        """
        places = [self.sources.index(sample.ref.source) for sample in samples]
        index = torch.tensor(places, dtype=torch.int64, device=self.total.device)
        total, count = loss.per_sample.float(), loss.per_sample_count.float()
        if chosen is not None:
            total, count = total * chosen.to(total), count * chosen.to(count)
        self.total.index_add_(0, index, total)
        self.count.index_add_(0, index, count)

    def compute(self) -> dict[str, float]:
        """Loss per token by source, and under "" over all; a source without tokens is left out."""
        totals, counts = self.total.tolist(), self.count.tolist()
        means = {
            source: total / count
            for source, total, count in zip(self.sources, totals, counts, strict=True)
            if count
        }
        return {**means, "": sum(totals) / sum(counts)} if means else {}
