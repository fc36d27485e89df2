"""The LLM backbone: embeddings (B, T, D) to hidden states (B, T, D)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn

from mmfusion.models.llms.sequence import SequenceShare
from mmfusion.processing.limits import Limits


class LLM(nn.Module, ABC):
    """A causal language model. As with encoders, the constructor reads configuration only and
    ``build`` makes the modules.

    Attributes:
        quantization: how the weights of linear layers are kept, where they are quantised.
    """

    quantization: Literal["nf4", "int8"] | None = None

    @property
    @abstractmethod
    def hidden_dim(self) -> int:
        """Width D. Known before ``build``."""

    @property
    def num_layers(self) -> int | None:
        """How many layers :meth:`forward_layers` gives the states of; None where that is known only
        when it runs. Known before ``build``.
        """
        return None

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

    def forward_layers(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor | None,
        layers: Sequence[int] = (-1,),
        share: SequenceShare | None = None,
    ) -> dict[int, Tensor]:
        """Hidden states (B, T, D) of chosen layers: -1 as :meth:`forward` gives them, 0 the
        embeddings, k the k-th layer's.

        Args:
            embeds: (B, T, D).
            position_ids: (B, T).
            cu_seqlens: borders of the samples.
            layers: those that are read.
            share: set where T is this rank's part of the row whose borders are in ``cu_seqlens``.

        Raises:
            ValueError: for layers the model does not give, and where it takes no part of a row.
        """
        if share is not None:
            raise ValueError(
                f"{type(self).__name__} cannot run on a part of a row; leave sequence_parallel out."
            )
        if odd := set(layers) - {-1, 0}:
            raise ValueError(
                f"{type(self).__name__} gives no hidden states of layers {sorted(odd)}; use -1."
            )
        given = {0: embeds, -1: self(embeds, position_ids, cu_seqlens)}
        return {layer: given[layer] for layer in layers}

    def add_tokens(self, tokens: Sequence[str]) -> None:
        """Add tokens to the vocabulary. Called before anything else is asked of the LLM.

        Raises:
            TypeError: where it has no ``new_tokens``.
        """
        if not hasattr(self, "new_tokens"):
            raise TypeError(
                f"{type(self).__name__} takes no new tokens, which a model that makes media needs."
            )
        cast(Any, self).new_tokens = [*cast(Any, self).new_tokens, *tokens]

    @property
    def layers(self) -> Sequence[nn.Module]:
        """What is repeated, once it is built: compiled one by one, and divided among ranks."""
        return [self]

    def tensor_plan(self, size: int) -> Mapping[str, str]:
        """How modules of :attr:`layers` are divided among ``size`` ranks that compute each token
        together: by name in the layer, in transformers' words (``colwise``, ``rowwise``). Empty
        where the family has no such plan. Once it is built.

        Raises:
            ValueError: where its heads cannot be divided so.
        """
        return {}

    def compile_layers(self) -> None:
        """Compile what is repeated (torch.compile), for any number of tokens."""
        for layer in self.layers:  # one by one: one small graph serves all of them, in seconds
            layer.compile(dynamic=True)

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """The output head, which :meth:`logits` runs. Once it is built."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., V), with the family's own scaling and soft-capping."""
