"""Conditionings of a validation beside the text encodings of all its captions, on all ranks: how
near each is to its own, and whether it is nearest to it.

Memory is bounded: of more targets than there is room for, those with the smallest keys count, which
are drawn from what the samples are. So the figures depend neither on the ranks nor on the batches.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch

from mmfusion.metrics.conditioning import CaptionMatch
from mmfusion.models.generators.similarity import similarities, units
from mmfusion.objectives.step_texts import gather_texts
from mmfusion.training.agreement import gather
from mmfusion.types import Captions, Conditioning, ConditioningSpec, TargetBatch

MOST = 1000
"""Targets that are compared."""
MOST_BYTES = 2**30
"""Of their conditionings and the encodings of their captions, on each rank."""
TOGETHER = 32
"""Conditionings, and captions, that are compared at a time."""


@dataclass(frozen=True)
class _Kept:
    """A target: its key, its caption, its conditioning (of one item, in half precision)."""

    key: int
    caption: str
    ours: Conditioning


class CaptionRetrieval:
    """The comparison of one validation.

    Args:
        spec: of the text encodings.
        device: where they are compared.
    """

    def __init__(self, spec: ConditioningSpec, device: torch.device) -> None:
        self._device = device
        numbers = spec.tokens * spec.dim + spec.pooled_dim
        self._room = min(MOST, MOST_BYTES // (2 * 2 * numbers))
        self._kept: list[_Kept] = []
        self._texts: dict[str, Conditioning] = {}

    def add(self, target: TargetBatch, ours: Conditioning, texts: Conditioning) -> None:
        """Add the targets of a batch that have a caption.

        Args:
            target: on the host.
            ours: their conditioning.
            texts: the text encoding of their captions.
        """
        # At length 1 half precision holds any of them; clones do not keep the batch alive.
        pairs = (
            [one.map(torch.clone) for one in units(given, torch.float16).to("cpu").split()]
            for given in (ours, texts)
        )
        items = zip(target.keys.tolist(), target.captions, *pairs, strict=True)
        for key, caption, one, text in items:
            if caption.strip():
                self._kept.append(_Kept(key, caption, one))
                self._texts.setdefault(caption, text)
        self._kept = heapq.nsmallest(self._room, self._kept, key=lambda kept: kept.key)
        self._texts = {kept.caption: self._texts[kept.caption] for kept in self._kept}

    def figures(self) -> dict[str, float]:
        """``cosine``, ``retrieval@k`` and the number of ``captions``, over all ranks, each of which
        must call it; nothing where there is no caption.
        """
        # Autocast on a CPU knows no way to join what is kept in float16.
        with torch.autocast(self._device.type, enabled=False):
            return self._figures()

    def _figures(self) -> dict[str, float]:
        keys = sorted(gather([kept.key for kept in self._kept]))
        last = keys[: self._room][-1] if keys else 0
        chosen = [kept for kept in self._kept if kept.key <= last]
        captions = sorted(set(gather([kept.caption for kept in chosen])))
        if not captions:
            return {}
        starts = range(0, len(captions), TOGETHER)
        columns = [self._similar(chosen, captions[i : i + TOGETHER]) for i in starts]
        places = {caption: place for place, caption in enumerate(captions)}
        own = torch.tensor([places[kept.caption] for kept in chosen], dtype=torch.int64)
        match = CaptionMatch().to(self._device)
        match.update(torch.cat(columns, 1), own)
        return {**match.compute(), "captions": len(captions)}

    def _similar(self, chosen: list[_Kept], captions: list[str]) -> torch.Tensor:
        """(M, K) of this rank's conditionings and some captions of any rank."""
        own = Captions([caption for caption in captions if caption in self._texts], {})
        texts = gather_texts(own, self._encoded, self._device)
        assert texts is not None, captions
        rows = [
            similarities(
                Conditioning.cat([kept.ours for kept in chosen[i : i + TOGETHER]]).to(self._device),
                texts.encoding,
            ).cpu()
            for i in range(0, len(chosen), TOGETHER)
        ]
        return torch.cat([torch.zeros(0, len(captions)), *rows])

    def _encoded(self, own: Captions) -> Conditioning:
        found = Conditioning.cat([self._texts[caption] for caption in own.captions])
        return found.to(self._device)
