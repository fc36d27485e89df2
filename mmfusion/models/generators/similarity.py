"""How alike conditionings and text encodings are: by this a contrastive loss tells captions apart,
and retrieval counts. M conditionings, K text encodings, C tokens of D_g.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfusion.types import Conditioning


def units(given: Conditioning, dtype: torch.dtype = torch.float32) -> Conditioning:
    """With each of its vectors at length 1."""
    tokens, pooled = (
        None if x is None else F.normalize(x.float(), dim=-1).to(dtype)
        for x in (given.tokens, given.pooled)
    )
    assert tokens is not None
    return Conditioning(tokens, pooled, given.mask)


def similarities(ours: Conditioning, texts: Conditioning) -> Tensor:
    """(M, K) fp32 cosines of M conditionings and K text encodings: the mean over the valid tokens
    of the text, averaged with that of the pooled vectors where both have such. Where an encoding is
    zero beyond its caption (Wan, Stable Audio), nothing there has a direction to compare.

    Raises:
        ValueError: where the two differ in C or D_g.
    """
    shapes = [tuple(given.tokens.shape[1:]) for given in (ours, texts)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"conditionings are of shape {shapes[0]}, text encodings of {shapes[1]}; they must be "
            "equal to be compared. Use a QueryDecoder."
        )
    with torch.autocast(ours.tokens.device.type, enabled=False):  # they are close to one another
        a, b = units(ours), units(texts)
        mask = (texts.valid.bool() & texts.tokens.ne(0).any(-1)).to(b.tokens)
        shares = mask / mask.sum(1, keepdim=True).clamp(min=1)
        cosines = a.tokens.flatten(1) @ (b.tokens * shares[..., None]).flatten(1).T
        if a.pooled is None or b.pooled is None:
            return cosines
        return (cosines + a.pooled @ b.pooled.T) / 2
