"""A linear input projector (LLaVA, arXiv:2304.08485), and the stacking that every projector here
shares: k neighbouring features become one token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfusion.models.projectors.base import Projector


class Linear(Projector):
    """One linear layer.

    Args:
        in_dim, out_dim: widths of the encoder's features and of the LLM, given by the model.
        stack: features concatenated into one token; the last token of an item is filled with zeros.
        norm: layer-normalise the (stacked) features first.
        bias: add a bias.
    """

    def __init__(
        self, in_dim: int, out_dim: int, stack: int = 1, norm: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        self.stack = checked_stack(stack)
        self.norm = nn.LayerNorm(in_dim * stack) if norm else nn.Identity()
        self.linear = nn.Linear(in_dim * stack, out_dim, bias=bias)

    def num_tokens(self, num_features: int) -> int:
        return -(-num_features // self.stack)

    def forward(self, features_NFD: Tensor, mask_NF: Tensor) -> Tensor:
        return self.linear(self.norm(stacked(features_NFD, mask_NF, self.stack)))


def stacked(features_NFD: Tensor, mask_NF: Tensor, stack: int) -> Tensor:
    """(N, F, D) to (N, ceil(F / stack), stack * D), with zeros where ``mask_NF`` is False."""
    if stack == 1:
        return features_NFD
    features_NFD = torch.where(mask_NF[..., None], features_NFD, 0)
    features_NFD = F.pad(features_NFD, (0, 0, 0, -features_NFD.shape[1] % stack))
    return features_NFD.unflatten(1, (-1, stack)).flatten(2)


def checked_stack(stack: int) -> int:
    """``stack``, refused below 1."""
    if stack < 1:
        raise ValueError(f"stack is {stack}; it must be 1 or more.")
    return stack
