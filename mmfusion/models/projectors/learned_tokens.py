"""Learned constants in place of media: the only fair no-media baseline. What a trained projector
gains over this is what the model takes from the media; shuffled or blank inputs overstate it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmfusion.models.projectors.base import Projector


class LearnedTokens(Projector):
    """The same learned tokens for every item; the features are not read and their encoder not run.

    Args:
        in_dim, out_dim: widths of the encoder's features and of the LLM, given by the model.
        like: the projector whose place it takes, for its number of tokens (None: one token a
            feature). It has no weights here.
        max_tokens: the most tokens an item may have.
    """

    reads_features = False

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        like: Callable[[int, int], Projector] | None = None,
        max_tokens: int = 256,
    ) -> None:
        super().__init__()
        self._count = None
        if like is not None:
            with torch.device("meta"):
                self._count = like(in_dim, out_dim).num_tokens
        self.tokens = nn.Parameter(torch.randn(max_tokens, out_dim) * 0.02)

    def num_tokens(self, num_features: int) -> int:
        count = (self._count or super().num_tokens)(num_features)
        if count > len(self.tokens):
            raise ValueError(
                f"an item of {num_features} features takes {count} tokens, LearnedTokens has "
                f"{len(self.tokens)}; raise max_tokens."
            )
        return count

    def forward(self, features_NFD: Tensor, mask_NF: Tensor) -> Tensor:
        count = self.num_tokens(features_NFD.shape[1])
        return self.tokens[:count].expand(len(features_NFD), -1, -1)
