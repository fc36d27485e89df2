"""How good the conditioning of generators is, over the targets of a validation: see
:mod:`mmfusion.metrics.conditioning`. Only what the loaded parts of a generator can tell is told.
"""

from __future__ import annotations

from typing import cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from mmfusion.metrics.conditioning import CONDITIONS, CaptionMatch, DenoisingLosses
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE
from mmfusion.models.generators.noise import generators_of
from mmfusion.models.generators.similarity import similarities
from mmfusion.training.agreement import gather
from mmfusion.training.module import MultimodalModule
from mmfusion.types import Batch, Conditioning

TOGETHER = 32
"""Captions that are encoded and compared at a time."""
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
        self._device = module.device
        # Several ranks must run the same graph, also where one has no target.
        self._idle_too = trainer.world_size > 1
        needs = self._model.needs
        self._kept: dict[str, list[tuple[Conditioning, str]]] = {
            modality: [] for modality, parts in needs.items() if TEXT_ENCODER in parts
        }
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._losses = {
            modality: DenoisingLosses().to(self._device)
            for modality, parts in needs.items()
            if parts >= {TEXT_ENCODER, VAE, DENOISER}
        }

    @torch.no_grad()
    def add(self, batch: Batch, conditioning: dict[str, Conditioning]) -> None:
        """Add a batch."""
        for modality, kept in self._kept.items():
            target, ours = batch.host.targets[modality], conditioning[modality]
            self._shapes[modality] = tuple(ours.tokens.shape[1:])
            if not target.idle:
                ours = ours.map(lambda x: x.float().cpu())
                pairs = zip(ours.split(), target.captions, strict=True)
                kept += [(one, caption) for one, caption in pairs if caption.strip()]
        for modality, losses in self._losses.items():
            target = batch.host.targets[modality]
            if target.idle and not self._idle_too:
                continue
            captioned = [bool(caption.strip()) for caption in target.captions]
            found = self._denoising(modality, batch, conditioning[modality])
            losses.update(found[:, torch.tensor(captioned, device=found.device)])

    def _denoising(self, modality: str, batch: Batch, ours: Conditioning) -> Tensor:
        """(3, M) losses, with the same noise under each of ``CONDITIONS``."""
        generator, target = self._model.generator(modality), batch.host.targets[modality]
        keys = target.keys.tolist()
        latents = generator.encode_media(
            batch.targets[modality].tensors, generators_of(keys, SEED + 1)
        )
        given = {
            "ours": ours,
            "caption": generator.encode_captions(batch.targets[modality]),
            "empty": _repeated(generator.encode_empty(), len(keys)),
        }
        return torch.stack(
            [generator.denoising_loss(latents, given[name], keys, SEED) for name in CONDITIONS]
        )

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Over all ranks, each of which must call it."""
        figures: dict[str, float] = {}
        for modality, kept in self._kept.items():
            distinct = sorted(set(gather([caption for _, caption in kept])))
            if distinct and self._comparable(modality):
                match = self._match(modality, distinct)
                figures |= {f"{name}/{modality}": x for name, x in match.compute().items()}
                figures[f"captions/{modality}"] = len(distinct)
        for modality, losses in self._losses.items():
            for name, value in losses.compute().items():
                gain = name == "gain"
                key = f"denoising_gain/{modality}" if gain else f"denoising/{modality}/{name}"
                figures[key] = value
        return figures

    def _comparable(self, modality: str) -> bool:
        """Whether conditioning and text encoding have one shape; the same on every rank."""
        spec = self._model.generator(modality).spec
        shape = self._shapes[modality]
        if shape == (spec.tokens, spec.dim):
            return True
        rank_zero_warn(
            f"no val/cosine/{modality} and val/retrieval: the output projector gives {shape}, the "
            f"text encoding has {(spec.tokens, spec.dim)}."
        )
        return False

    def _match(self, modality: str, distinct: list[str]) -> CaptionMatch:
        """Each conditioning of this rank beside the captions of all."""
        places = {caption: place for place, caption in enumerate(distinct)}
        kept, match = self._kept[modality], CaptionMatch().to(self._device)
        encode = self._model.generator(modality).encode_text
        columns = []
        for start in range(0, len(distinct), TOGETHER):
            texts = encode(distinct[start : start + TOGETHER])
            rows = [
                similarities(
                    Conditioning.cat([ours for ours, _ in kept[i : i + TOGETHER]]).to(self._device),
                    texts,
                ).cpu()
                for i in range(0, len(kept), TOGETHER)
            ]
            columns.append(torch.cat([torch.zeros(0, len(texts.tokens)), *rows]))
        own = torch.tensor([places[caption] for _, caption in kept], dtype=torch.int64)
        match.update(torch.cat(columns, 1), own)
        return cast(CaptionMatch, match)


def _repeated(one: Conditioning, count: int) -> Conditioning:
    """The same for each of several items."""
    return one.map(lambda x: x.expand(count, *x.shape[1:]))
