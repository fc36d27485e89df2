"""The input projector: features (N, F, D_m) to LLM tokens (N, P, D)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn


class Projector(nn.Module, ABC):
    """Maps an encoder's features into the LLM's embedding space.

    Recipes give every argument but the two widths: a projector is declared as ``Callable[[int,
    int], Projector]`` and made with ``(in_dim, out_dim)`` once the encoder and the LLM are known.
    """

    reads_features: bool = True
    """False for a projector that ignores its input (the no-media baseline): its frozen encoder is
    then not run.
    """
    means: ClassVar[tuple[str, ...]] = ()
    """Arguments, kept as attributes, that change what the weights compute and not their shapes: a
    later stage that takes the weights must have the same ones.
    """

    def num_tokens(self, num_features: int) -> int:
        """Tokens P that ``num_features`` features become. Called without weights (on the meta
        device).
        """
        return num_features

    @abstractmethod
    def forward(self, features_NFD: Tensor, mask_NF: Tensor) -> Tensor:
        """Project N items.

        Args:
            features_NFD: (N, F, in_dim).
            mask_NF: (N, F) bool, True on valid features.

        Returns:
            (N, P, out_dim); row n's first ``num_tokens(mask_NF[n].sum())`` tokens are valid.
        """
