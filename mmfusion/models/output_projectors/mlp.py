"""Output projectors without attention: each signal token becomes one token of the conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from transformers.activations import ACT2FN

from mmfusion.models.output_projectors.base import OutputProjector
from mmfusion.types import Conditioning, ConditioningSpec


class MLP(OutputProjector):
    """``depth`` linear layers with an activation between each two, on every signal state alone.

    A generator of one conditioning token gets the mean of the projected states; another one gets as
    many tokens as there are signal tokens.

    Args:
        in_dim, spec: given by the model.
        layers: see the base class.
        add_embeddings: see the base class.
        baseline: see the base class.
        depth: linear layers; 1 is a linear projector.
        hidden_dim: width between the layers (None: ``in_dim``).
        activation: a name transformers knows.
    """

    means = (*OutputProjector.means, "activation")

    def __init__(
        self,
        in_dim: int,
        spec: ConditioningSpec,
        layers: Sequence[int] = (-1,),
        add_embeddings: bool = False,
        baseline: str = "",
        depth: int = 2,
        hidden_dim: int | None = None,
        activation: str = "gelu",
    ) -> None:
        super().__init__(in_dim, spec, layers, add_embeddings, baseline)
        if depth < 1:
            raise ValueError(f"depth is {depth}; an MLP needs at least 1 linear layer.")
        if activation not in ACT2FN:
            raise ValueError(f"activation {activation!r} is unknown; one of {sorted(ACT2FN)}.")
        self.activation = activation
        widths = [in_dim, *[hidden_dim or in_dim] * (depth - 1)]
        parts: list[nn.Module] = []
        for before, after in pairwise(widths):
            parts += [nn.Linear(before, after), ACT2FN[activation]]
        self.body = nn.Sequential(*parts)
        self.outward = nn.Linear(widths[-1], spec.dim)
        self.pooled = nn.Linear(widths[-1], spec.pooled_dim) if spec.pooled_dim else None

    def project(self, states_MSD: Tensor) -> Conditioning:
        states = self.body(states_MSD)
        pooled = self.pooled(states.mean(1)) if self.pooled else None
        if self.spec.tokens == 1:
            states = states.mean(1, keepdim=True)
        return Conditioning(self.outward(states), pooled)


class Linear(MLP):
    """One linear layer.

    Args:
        in_dim, spec: given by the model.
        layers: see the base class.
        add_embeddings: see the base class.
        baseline: see the base class.
    """

    def __init__(
        self,
        in_dim: int,
        spec: ConditioningSpec,
        layers: Sequence[int] = (-1,),
        add_embeddings: bool = False,
        baseline: str = "",
    ) -> None:
        super().__init__(in_dim, spec, layers, add_embeddings, baseline, depth=1)
