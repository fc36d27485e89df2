"""An MLP input projector (LLaVA-1.5, arXiv:2310.03744: Linear, GELU, Linear)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from mmfusion.models.projectors.base import Projector
from mmfusion.models.projectors.linear import checked_stack, stacked


class MLP(Projector):
    """``depth`` linear layers with an activation between each two.

    Args:
        in_dim, out_dim: widths of the encoder's features and of the LLM, given by the model.
        depth: linear layers; 2 is LLaVA-1.5's.
        activation: a name transformers knows: gelu, silu, relu, gelu_pytorch_tanh, ...
        hidden_dim: width between the layers (None: ``out_dim``).
        stack: features concatenated into one token; the last token of an item is filled with zeros.
        norm: layer-normalise the (stacked) features first.
    """

    means = ("activation",)

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        depth: int = 2,
        activation: str = "gelu",
        hidden_dim: int | None = None,
        stack: int = 1,
        norm: bool = False,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth is {depth}; an MLP needs at least 1 linear layer.")
        if activation not in ACT2FN:
            raise ValueError(f"activation {activation!r} is unknown; one of {sorted(ACT2FN)}.")
        self.activation = activation
        self.stack = checked_stack(stack)
        widths = [in_dim * stack, *[hidden_dim or out_dim] * (depth - 1), out_dim]
        layers: list[nn.Module] = [nn.LayerNorm(widths[0])] if norm else []
        for index in range(depth):
            if index:
                layers.append(ACT2FN[activation])
            layers.append(nn.Linear(widths[index], widths[index + 1]))
        self.layers = nn.Sequential(*layers)

    def num_tokens(self, num_features: int) -> int:
        return -(-num_features // self.stack)

    def forward(self, features_NFD: Tensor, mask_NF: Tensor) -> Tensor:
        return self.layers(stacked(features_NFD, mask_NF, self.stack))
