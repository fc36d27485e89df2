"""How good our conditioning is, before anything is drawn: how near to the text encoding of the
caption, told from other captions or not, and what the denoiser makes of it.

M conditionings, K captions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

CONDITIONS = ("ours", "caption", "empty")
"""What the denoiser is given: our conditioning, the caption's encoding, that of ""."""
LEAST = 1e-3
"""Of the loss without a caption, what knowing it must take off for a share of that to mean much."""


class CaptionMatch(Metric):
    """Cosine to the own caption's encoding, and how often that is among the k nearest of all.

    Args:
        at: each k.
    """

    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self, at: Sequence[int] = (1, 5)) -> None:
        super().__init__()
        self.at = tuple(at)
        self.add_state("sums", torch.zeros(1 + len(self.at)).double(), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, similar_MK: Tensor, own_M: Tensor) -> None:
        """Add conditionings.

        Args:
            similar_MK: to the encodings of the K distinct captions, of
                :func:`mmfusion.models.generators.similarity.similarities`.
            own_M: which caption is its own.
        """
        own = similar_MK.gather(1, own_M[:, None])
        # Others that are as near count against it, and so does what is not a number.
        nearer = (~(similar_MK < own)).sum(1) - 1
        parts = [own[:, 0], *((nearer < k) for k in self.at)]
        self.sums += torch.stack([part.double().sum() for part in parts]).to(self.sums)
        self.count += len(own_M)

    def compute(self) -> dict[str, float]:
        """``cosine`` and ``retrieval@k``; nothing without conditionings."""
        names = ["cosine", *(f"retrieval@{k}" for k in self.at)]
        count = int(self.count)
        return {n: x / count for n, x in zip(names, self.sums.tolist(), strict=True) if count}


class DenoisingLosses(Metric):
    """The generator's own loss under our conditioning, the caption's encoding and that of ""."""

    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(len(CONDITIONS)).double(), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, losses: Tensor) -> None:
        """Add (3, M) losses of the same targets under the same noise, in order of
        :data:`CONDITIONS`.
        """
        self.sums += losses.double().sum(1).to(self.sums)
        self.count += losses.shape[1]

    def compute(self) -> dict[str, float]:
        """The three means, and the ``gain``: the share that ours reaches of what the caption's
        encoding gains over "". No gain where that is next to nothing.
        """
        if not int(self.count):
            return {}
        means = (self.sums / self.count).tolist()
        ours, caption, empty = means
        figures = dict(zip(CONDITIONS, means, strict=True))
        known = empty - caption
        return figures | ({"gain": (empty - ours) / known} if known > LEAST * empty else {})
