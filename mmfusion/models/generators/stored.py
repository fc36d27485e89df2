"""What a generator's frozen parts make of a target, as tensors that come with it: the VAE's moments
and the text encoding of the caption. With them the parts are not needed (``mmfusion data encode``).

M targets.
"""

from __future__ import annotations

from torch import Tensor

from mmfusion.types import CAPTION, Conditioning, MediaTensors

MEAN, STD = "latents.mean", "latents.std"
TOKENS, POOLED, MASK = f"{CAPTION}tokens", f"{CAPTION}pooled", f"{CAPTION}mask"


def moments_in(tensors: MediaTensors) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation (M, ...) of the latents; None where they did not come along."""
    return (tensors[MEAN], tensors[STD]) if MEAN in tensors else None


def text_in(tensors: MediaTensors) -> Conditioning | None:
    """The text encoding of M captions; None where it did not come along."""
    if TOKENS not in tensors:
        return None
    return Conditioning(tensors[TOKENS], tensors.get(POOLED), tensors.get(MASK))


def with_moments(moments: tuple[Tensor, Tensor]) -> MediaTensors:
    """The tensors that :func:`moments_in` reads."""
    return dict(zip((MEAN, STD), moments, strict=True))


def with_text(text: Conditioning) -> MediaTensors:
    """The tensors that :func:`text_in` reads."""
    found = {TOKENS: text.tokens, POOLED: text.pooled, MASK: text.mask}
    return {name: tensor for name, tensor in found.items() if tensor is not None}
