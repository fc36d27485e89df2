"""The projected conditioning against the generator's own text encoding of the caption
(arXiv:2309.05519, its alignment of the decoding side). M targets, C tokens, D_g width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.generators.base import TEXT_ENCODER
from mmfusion.objectives.base import Loss, TargetObjective, over_targets
from mmfusion.types import Batch, Conditioning, ModelOutput

Distance = Literal["cosine", "mse", "l2"]


class ConditionAlignment(TargetObjective):
    """Mean distance over the valid tokens of the text encoding (and to its pooled vector).

    Args:
        modality: of the targets.
        distance: ``cosine``: 1 - cos, the one for unit vectors, whose squared error is tiny;
            ``mse``: mean over the width; ``l2``: Euclidean norm (NExT-GPT's).
        weight: of this loss in the sum.
    """

    needs = frozenset({TEXT_ENCODER})
    captions = True

    def __init__(self, modality: str, distance: Distance = "mse", weight: float = 1.0) -> None:
        super().__init__(modality, weight)
        self.distance = distance

    def forward(self, model: AnyToAnyModel, output: ModelOutput, batch: Batch) -> Loss:
        found, target = output.conditioning[self.modality], batch.host.targets[self.modality]
        if target.idle:
            return over_targets(0.0 * found.tokens.sum((1, 2)), target, len(batch.samples))
        generator = model.generator(self.modality)
        wanted = generator.encode_captions(batch.targets[self.modality])
        return over_targets(self.distances(found, wanted), target, len(batch.samples))

    def distances(self, found: Conditioning, wanted: Conditioning) -> Tensor:
        """(M,) fp32.

        Raises:
            ValueError: where the two differ in shape.
        """
        if found.tokens.shape != wanted.tokens.shape:
            raise ValueError(
                f"{self.modality}: the output projector gives conditioning of shape "
                f"{tuple(found.tokens.shape)}, the text encoding has {tuple(wanted.tokens.shape)}; "
                "they must be equal to be compared. Use a QueryDecoder, or train by denoising."
            )
        each = self._distance(found.tokens, wanted.tokens)
        mask = torch.ones_like(each) if wanted.mask is None else wanted.mask.to(each)
        total = (each * mask).sum(1) / mask.sum(1).clamp(min=1)
        if found.pooled is not None and wanted.pooled is not None:
            total = total + self._distance(found.pooled, wanted.pooled)
        return total

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.float(), b.float()
        if self.distance == "cosine":
            return 1 - F.cosine_similarity(a, b, dim=-1)
        if self.distance == "l2":
            return torch.linalg.vector_norm(a - b, dim=-1)
        return (a - b).square().mean(-1)
