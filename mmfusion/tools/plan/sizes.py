"""What a recipe's weights take, and which of them a strategy may divide."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mmfusion.training.module import MultimodalModule
from mmfusion.training.strategies.zero import whole_modules


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights.

    Attributes:
        trained: weights that train.
        frozen: weights that do not, and buffers.
        trained_divided: of the trained ones, those inside what ZeRO stage 3 divides: the LLM
            without its output head.
        frozen_divided: of the frozen ones.
        layer: of the largest layer of the LLM.
        largest: trained weight.
        number: of trained numbers.
        number_divided: of numbers in what is divided.
    """

    trained: int
    frozen: int
    trained_divided: int
    frozen_divided: int
    layer: int
    largest: int
    number: int
    number_divided: int


def sizes(module: MultimodalModule) -> Sizes:
    """Of a built module, its tuning applied."""
    parameters = [*module.model.parameters()]
    buffers = [*module.model.buffers()]
    whole = {p for part in whole_modules(module) for p in part.parameters(recurse=False)}
    inside = [p for p in parameters if p not in whole]
    trained = [p for p in parameters if p.requires_grad]
    layers = next((m for m in module.model.llm.modules() if isinstance(m, nn.ModuleList)), ())
    return Sizes(
        trained=_bytes(trained),
        frozen=_bytes([p for p in parameters if not p.requires_grad]) + _bytes(buffers),
        trained_divided=_bytes([p for p in inside if p.requires_grad]),
        frozen_divided=_bytes([p for p in inside if not p.requires_grad]),
        layer=max((_bytes([*layer.parameters()]) for layer in layers), default=0),
        largest=max((_bytes([p]) for p in trained), default=0),
        number=sum(p.numel() for p in trained),
        number_divided=sum(p.numel() for p in inside),
    )


def _bytes(tensors: list[Tensor] | list[nn.Parameter]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
