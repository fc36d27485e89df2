"""The captions of a whole optimizer step, on all ranks, with the generator's encoding of each: what
a contrastive loss tells a target's own caption apart from.

A rank encodes what its own targets say; the encodings are gathered. K distinct captions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from mmfusion.types import Captions, Conditioning

FIELDS = ("tokens", "pooled", "mask")
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""For each tensor that there is, its type and the shape of a row."""


@dataclass
class Texts:
    """Captions and what a generator's text encoder makes of them.

    Attributes:
        captions: K.
        encoding: of K items.
    """

    captions: list[str]
    encoding: Conditioning

    def distinct(self) -> Texts:
        """Each caption once, sorted: in the same order however a step was divided."""
        captions = sorted(set(self.captions))
        return Texts(captions, self.take(self.places(captions)))

    def places(self, captions: Sequence[str]) -> Tensor:
        """(M,) where each caption is.

        Raises:
            ValueError: where one is not among them.
        """
        known = {caption: place for place, caption in enumerate(self.captions)}
        if strange := [caption for caption in captions if caption not in known]:
            raise ValueError(
                f"the captions {strange[:4]} are not among the {len(known)} of this step; "
                "Objective.begin_step must be called with the first micro-batch of each step."
            )
        places = torch.tensor([known[caption] for caption in captions])
        return places.to(self.encoding.tokens.device, non_blocking=True)

    def take(self, places_M: Tensor) -> Conditioning:
        """The encodings at M places."""
        return self.encoding.map(lambda rows: rows[places_M])


def gather_texts(
    own: Captions, encode: Callable[[Captions], Conditioning], device: torch.device
) -> Texts | None:
    """The captions of all ranks, which must all call this. None where no rank has any.

    Args:
        own: of this rank, distinct and sorted; there may be none.
        encode: their encoding by a generator, without gradients.
        device: of the encodings.
    """
    encoded = encode(own) if own.captions else None
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Texts(own.captions, encoded) if encoded else None
    heads: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(heads, (own.captions, _layout(encoded)))
    counts = [len(theirs) for theirs, _ in heads]
    if not any(counts):
        return None
    layout: Layout = next(found for _, found in heads if found)
    rows = {
        name: _gather(getattr(encoded, name, None), counts, *layout[name], device)
        for name in FIELDS
        if name in layout
    }
    captions = [caption for theirs, _ in heads for caption in theirs]
    return Texts(captions, Conditioning(**rows)).distinct()


def _layout(encoding: Conditioning | None) -> Layout:
    found = {name: getattr(encoding, name, None) for name in FIELDS}
    return {name: (x.dtype, tuple(x.shape[1:])) for name, x in found.items() if x is not None}


def _gather(
    own: Tensor | None,
    counts: Sequence[int],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """The rows of all ranks, one rank after the other."""
    padded = torch.zeros(max(counts), *shape, dtype=dtype, device=device)
    if own is not None:
        padded[: len(own)] = own
    # As bytes, for not every backend knows every type.
    found = [torch.empty_like(padded.view(torch.uint8)) for _ in counts]
    dist.all_gather(found, padded.view(torch.uint8))
    return torch.cat([x.view(dtype)[:count] for x, count in zip(found, counts, strict=True)])
