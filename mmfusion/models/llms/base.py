"""The LLM backbone: embeddings (B, T, D) to hidden states (B, T, D)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from mmfusion.processing.limits import Limits


class LLM(nn.Module, ABC):
    """A causal language model. As with encoders, the constructor reads configuration only and
    ``build`` makes the modules.
    """

    @property
    @abstractmethod
    def hidden_dim(self) -> int:
        """Width D. Known before ``build``."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer with every added token of this recipe. Works before ``build``;
        made once.
        """

    def limits(self) -> Limits:
        """How many tokens it takes, and which. Works before ``build``."""
        return Limits()

    @abstractmethod
    def build(self, pretrained: bool = True) -> None:
        """Make the modules; with ``pretrained`` load every weight, failing if one is missing, else
        initialise at random.
        """

    @abstractmethod
    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, T) ids to (B, T, D) embeddings. Placeholder ids may be any value: their rows are
        overwritten.
        """

    @abstractmethod
    def forward(self, embeds: Tensor, position_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """(B, T, D) to hidden states (B, T, D) after the last norm; attention never crosses a
        border of ``cu_seqlens``.
        """

    def compile_layers(self) -> None:
        """Compile what is repeated (torch.compile), for any number of tokens."""
        self.compile(dynamic=True)

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., V), with the family's own scaling and soft-capping."""
