"""The projected conditioning against the generator's own text encoding of the caption
(arXiv:2309.05519, its alignment of the decoding side). M targets, C tokens, D_g width, K captions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.generators.base import TEXT_ENCODER, Generator
from mmfusion.models.generators.similarity import similarities
from mmfusion.objectives.base import Loss, TargetObjective, over_targets
from mmfusion.objectives.step_texts import Texts, gather_texts
from mmfusion.types import Batch, Conditioning, ConditioningSpec, ModelOutput

Distance = Literal["cosine", "mse", "l2"]


class ConditionAlignment(TargetObjective):
    """Mean distance over the valid tokens of the text encoding (and to its pooled vector).

    Args:
        modality: of the targets.
        distance: ``cosine``: 1 - cos, the one for unit vectors, whose squared error is tiny;
            ``mse``: mean over the width; ``l2``: Euclidean norm (NExT-GPT's).
        weight: of this loss in the sum.
        contrastive: weight of InfoNCE (arXiv:1807.03748) beside the distance: of all captions of
            the optimizer step, on all ranks, a target's conditioning is to be most like the
            encoding of its own. That is what retrieval measures. Targets of one caption are of one
            class. In evaluation the captions are those of the batch.
        temperature: of InfoNCE.
    """

    needs = frozenset({TEXT_ENCODER})
    captions = True

    def __init__(
        self,
        modality: str,
        distance: Distance = "mse",
        weight: float = 1.0,
        contrastive: float = 0.0,
        temperature: float = 0.07,
    ) -> None:
        super().__init__(modality, weight)
        if not (0 <= contrastive < math.inf and 0 < temperature < math.inf):
            raise ValueError(
                f"contrastive is {contrastive} and temperature {temperature}; expected a weight of "
                "0 or more and a temperature above 0, both finite."
            )
        self.distance = distance
        self.contrastive, self.temperature = contrastive, temperature
        self.step_captions = contrastive > 0
        self._step_texts: Texts | None = None

    def check(self, generator: Generator, given: ConditioningSpec) -> None:
        wanted = generator.spec
        self._compare((given.tokens, given.dim), (wanted.tokens, wanted.dim))

    def begin_step(self, model: AnyToAnyModel, batch: Batch) -> None:
        if self.contrastive:
            encode = model.generator(self.modality).encode_captions
            own = batch.step_captions[self.modality]
            self._step_texts = gather_texts(own, encode, batch.input_ids.device)

    def forward(self, model: AnyToAnyModel, output: ModelOutput, batch: Batch) -> Loss:
        found, target = output.conditioning[self.modality], batch.host.targets[self.modality]
        if target.idle:
            return over_targets(0.0 * found.tokens.sum((1, 2)), target, len(batch.samples))
        if self.contrastive and self.training:
            assert self._step_texts is not None, "begin_step comes before the losses of a step"
            texts = self._step_texts
        elif self.contrastive and batch.bounds is not None:
            # Those of the whole batch, of which ranks have a part of the targets each.
            own = batch.step_captions[self.modality]
            texts = Texts(own.captions, model.generator(self.modality).encode_captions(own))
        else:
            encode = model.generator(self.modality).encode_captions
            texts = Texts(target.captions, encode(batch.targets[self.modality])).distinct()
        places = texts.places(target.captions)
        losses = self.distances(found, texts.take(places))
        if self.contrastive:
            losses = losses + self.contrastive * self.info_nce(found, texts.encoding, places)
        return over_targets(losses, target, len(batch.samples))

    def info_nce(self, found: Conditioning, texts: Conditioning, places_M: Tensor) -> Tensor:
        """(M,) cross entropy of each target's own caption among K.

        Args:
            found: of M targets.
            texts: encodings of K distinct captions.
            places_M: of each target's own among them.
        """
        logits_MK = similarities(found, texts) / self.temperature
        return F.cross_entropy(logits_MK, places_M, reduction="none")

    def distances(self, found: Conditioning, wanted: Conditioning) -> Tensor:
        """(M,) fp32.

        Raises:
            ValueError: where the two differ in shape.
        """
        self._compare(found.tokens.shape, wanted.tokens.shape)
        each = self._distance(found.tokens, wanted.tokens)
        mask = torch.ones_like(each) if wanted.mask is None else wanted.mask.to(each)
        total = (each * mask).sum(1) / mask.sum(1).clamp(min=1)
        if found.pooled is not None and wanted.pooled is not None:
            total = total + self._distance(found.pooled, wanted.pooled)
        return total

    def _compare(self, found: Sequence[int], wanted: Sequence[int]) -> None:
        if tuple(found) != tuple(wanted):
            raise ValueError(
                f"{self.modality}: the output projector gives conditioning of shape "
                f"{tuple(found)}, the text encoding has {tuple(wanted)}; they must be equal to be "
                "compared. Use a QueryDecoder, or as many signal tokens, or train by denoising."
            )

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.float(), b.float()
        if self.distance == "cosine":
            return 1 - F.cosine_similarity(a, b, dim=-1)
        if self.distance == "l2":
            return torch.linalg.vector_norm(a - b, dim=-1)
        return (a - b).square().mean(-1)
