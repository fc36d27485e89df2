"""Fréchet distance of made to true media (arXiv:1706.08500) in the features of any encoder: FID
with a vision encoder's, FAD with an audio encoder's. By torchmetrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.image.fid import FrechetInceptionDistance

from mmfusion.metrics.judges.base import Judge
from mmfusion.models.encoders.base import Encoder
from mmfusion.models.fusion import first_n
from mmfusion.types import DataError, Media


class FrechetDistance(Judge):
    """``frechet``: how far the made media are from the true ones as a set, 0 where they are alike.

    It falls with the number of media and depends on the encoder: compare figures of equal numbers
    under the same one only. With fewer media than features it says little. ``left_out``, where
    there are any: made media that cannot be decoded, as a silent sound; the distance is of the
    others.

    Args:
        encoder: its features, averaged over a medium, are compared.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.modality = encoder.media_processor().modality
        self.distance = FrechetInceptionDistance(_Given(encoder.out_dim)).set_dtype(torch.float64)
        # Known otherwise only where something was judged, which not every rank may have.
        self.distance.orig_dtype = torch.float64
        self.count, self.left_out = SumMetric(), SumMetric()
        self._processor: Any = None

    def build(self) -> None:
        self.encoder.build()
        self.eval().requires_grad_(False)
        self._processor = self.encoder.media_processor()

    @torch.no_grad()
    def update(self, made: Sequence[Media], wanted: Sequence[Media]) -> None:
        pairs = [pair for pair in zip(made, wanted, strict=True) if self._decodes(pair[0])]
        self.left_out.update(len(made) - len(pairs))
        if pairs:
            self.distance.update(self._features([one for one, _ in pairs]), real=False)
            self.distance.update(self._features([true for _, true in pairs]), real=True)
            self.count.update(len(pairs))

    def _decodes(self, medium: Media) -> bool:
        try:
            self._processor(medium)
        except DataError:
            return False
        return True

    def _features(self, media: Sequence[Media]) -> Tensor:
        """(N, D): means over the valid features."""
        tensors = self._processor.collate([self._processor(item) for item in media])
        device = self.count.device
        features = self.encoder({name: tensor.to(device) for name, tensor in tensors.items()})
        counts = torch.tensor([self._processor.num_features(item) for item in media])
        valid = first_n(counts, features.shape[1]).to(features)[..., None]
        return (features * valid).sum(1).double() / counts.to(device)[:, None]

    def compute(self) -> dict[str, float]:
        count, left_out = float(self.count.compute()), float(self.left_out.compute())
        found = {"frechet": float(self.distance.compute())} if count >= 2 else {}
        return found | ({"left_out": left_out} if left_out else {})


class _Given(nn.Module):
    """torchmetrics' feature extractor, where the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
