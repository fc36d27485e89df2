"""How good the conditioning of generators is, over the targets of a validation: see
:mod:`mmfusion.metrics.conditioning`. Only what the loaded parts of a generator can tell is told, or
what stored parts left with the targets.
"""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from mmfusion.metrics.conditioning import CONDITIONS, DenoisingLosses
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE
from mmfusion.models.generators.noise import generators_of
from mmfusion.training.callbacks.caption_retrieval import CaptionRetrieval
from mmfusion.training.module import MultimodalModule
from mmfusion.types import Batch, Conditioning

SEED = 0
"""Of the noise, with each target's key: figures of runs with other seeds can be compared."""


class MediaHealth:
    """Sums of one validation.

    Args:
        trainer: that validates.
        module: what is validated.
    """

    def __init__(self, trainer: L.Trainer, module: MultimodalModule) -> None:
        self._model: AnyToAnyModel = module.model
        # Several ranks must run the same graph, also where one has no target.
        self._idle_too = trainer.world_size > 1
        there = {
            modality: parts | self._model.stored.get(modality, frozenset())
            for modality, parts in self._model.needs.items()
        }
        self._retrieval = {
            modality: CaptionRetrieval(self._model.generator(modality).spec, module.device)
            for modality, parts in there.items()
            if TEXT_ENCODER in parts
        }
        self._losses = {
            modality: DenoisingLosses().to(module.device)
            for modality, parts in there.items()
            if parts >= {TEXT_ENCODER, VAE, DENOISER}
        }
        self._shapes: dict[str, tuple[int, ...]] = {}

    @torch.no_grad()
    def add(self, batch: Batch, conditioning: dict[str, Conditioning]) -> None:
        """Add a batch."""
        for modality, retrieval in self._retrieval.items():
            target, ours = batch.host.targets[modality], conditioning[modality]
            self._shapes[modality] = tuple(ours.tokens.shape[1:])
            if target.idle and not self._idle_too:
                continue
            texts = self._model.generator(modality).encode_captions(batch.targets[modality])
            if self._comparable(modality):
                retrieval.add(target, ours, texts)
            if modality in self._losses:
                captioned = [bool(caption.strip()) for caption in target.captions]
                found = self._denoising(modality, batch, ours, texts)
                found = found[:, torch.tensor(captioned, device=found.device)]
                self._losses[modality].update(found)

    def _denoising(
        self, modality: str, batch: Batch, ours: Conditioning, texts: Conditioning
    ) -> Tensor:
        """(3, M) losses, with the same noise under each of ``CONDITIONS``."""
        generator = self._model.generator(modality)
        keys = batch.host.targets[modality].keys.tolist()
        latents = generator.encode_media(
            batch.targets[modality].tensors, generators_of(keys, SEED + 1)
        )
        empty = generator.encode_empty().map(lambda x: x.expand(len(keys), *x.shape[1:]))
        given = {"ours": ours, "caption": texts, "empty": empty}
        return torch.stack(
            [generator.denoising_loss(latents, given[name], keys, SEED) for name in CONDITIONS]
        )

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Over all ranks, each of which must call it."""
        figures: dict[str, float] = {}
        for modality, retrieval in self._retrieval.items():
            found = retrieval.figures()
            figures |= {f"{name}/{modality}": value for name, value in found.items()}
            if modality in self._shapes and not self._comparable(modality):
                rank_zero_warn(
                    f"no val/cosine/{modality} and val/retrieval: the output projector gives "
                    f"{self._shapes[modality]}, the text encoding has {self._wanted(modality)}."
                )
        for modality, losses in self._losses.items():
            for name, value in losses.compute().items():
                gain = name == "gain"
                key = f"denoising_gain/{modality}" if gain else f"denoising/{modality}/{name}"
                figures[key] = value
        return figures

    def _comparable(self, modality: str) -> bool:
        """Whether conditioning and text encoding have one shape; the same on every rank."""
        return self._shapes[modality] == self._wanted(modality)

    def _wanted(self, modality: str) -> tuple[int, ...]:
        spec = self._model.generator(modality).spec
        return spec.tokens, spec.dim
