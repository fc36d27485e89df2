"""The output projector: the LLM's hidden states at signal tokens to what a generator is conditioned
on.

M targets, S signal tokens of a target, D hidden, L layers, C and D_g tokens and width of the
conditioning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmfusion.types import Conditioning, ConditioningSpec


class OutputProjector(nn.Module, ABC):
    """Maps signal states to conditioning.

    Recipes give every argument but the first two: an output projector is declared as
    ``Callable[[int, ConditioningSpec], OutputProjector]`` and made with the LLM's width and the
    generator's specification.

    Args:
        in_dim: D.
        spec: what the generator takes.
        layers: whose hidden states are read: -1 the last (after its norm), 0 the embeddings, k the
            k-th layer's. Of several, a learned mix (softmax weights and a scale, as in
            arXiv:1802.05365, eq. 1), which starts at their mean.
        add_embeddings: add the signal tokens' own embeddings to the states (as NExT-GPT does,
            arXiv:2309.05519).
        baseline: a request that asks for nothing, such as ".": the states that answer it are taken
            away first. What a signal token is hides what is asked for otherwise: of a small LLM's
            states 95 % were the same whatever the caption.
    """

    means: ClassVar[tuple[str, ...]] = ("layers", "add_embeddings", "baseline")
    """Arguments, kept as attributes, that change what the weights compute and not their shapes: a
    later stage that takes the weights must have the same ones.
    """

    def __init__(
        self,
        in_dim: int,
        spec: ConditioningSpec,
        layers: Sequence[int] = (-1,),
        add_embeddings: bool = False,
        baseline: str = "",
    ) -> None:
        super().__init__()
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"layers is {list(layers)}; expected one or more, each once.")
        self.in_dim, self.spec = in_dim, spec
        self.layers = tuple(layers)
        self.add_embeddings = add_embeddings
        self.baseline = baseline
        if len(layers) > 1:
            self.mix = nn.Parameter(torch.zeros(len(layers)))
            self.scale = nn.Parameter(torch.ones(1))  # () is what DeepSpeed cannot send

    def forward(self, states: Mapping[int, Tensor], embeds_MSD: Tensor) -> Conditioning:
        """Conditioning of M targets.

        Args:
            states: (M, S, D) of each of :attr:`layers`.
            embeds_MSD: the signal tokens' embeddings.
        """
        # In the precision of its own weights, fp32 where it trains: what is asked for is a small
        # part of the states, and bf16 activations round it away.
        dtype = next((p.dtype for p in self.parameters()), embeds_MSD.dtype)
        with torch.autocast(embeds_MSD.device.type, enabled=False):
            chosen = [states[layer].to(dtype) for layer in self.layers]
            mixed = chosen[0]
            if len(chosen) > 1:
                mixed = self.scale * torch.einsum(
                    "l,lmsd->msd", self.mix.softmax(0), torch.stack(chosen)
                )
            if self.add_embeddings:
                mixed = mixed + embeds_MSD.to(dtype)
            return self.project(mixed)

    @abstractmethod
    def project(self, states_MSD: Tensor) -> Conditioning:
        """(M, S, D) to the generator's conditioning."""
