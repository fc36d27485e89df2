"""What a recipe's weights take, and which of them a strategy may divide."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from mmfusion.training.module import MultimodalModule
from mmfusion.training.strategies.zero import whole_modules


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights, where it does not say otherwise.

    Attributes:
        trained: weights that train.
        frozen: weights that do not, and buffers.
        trained_divided: of the trained ones, those that ZeRO stage 3 divides: the LLM's without its
            output head.
        frozen_divided: of the frozen ones.
        frozen_outside: of the frozen ones, those outside the LLM, which nothing divides.
        layers: of all layers of the LLM.
        layer: of the largest of them.
        number: how many numbers train.
        number_divided: how many are in what ZeRO stage 3 divides.
        number_layer: how many are in the largest layer.
    """

    trained: int
    frozen: int
    trained_divided: int = 0
    frozen_divided: int = 0
    frozen_outside: int = 0
    layers: int = 0
    layer: int = 0
    number: int = 0
    number_divided: int = 0
    number_layer: int = 0


def sizes(module: MultimodalModule) -> Sizes:
    """Of a built module, its tuning applied."""
    model = module.model
    parameters, buffers = [*model.parameters()], _bytes(model.buffers())
    trained = [p for p in parameters if p.requires_grad]
    frozen = [p for p in parameters if not p.requires_grad]
    llm = set(model.llm.parameters())
    whole = {p for part in whole_modules(module) for p in part.parameters(recurse=False)}
    found = next((m for m in model.llm.modules() if isinstance(m, nn.ModuleList)), ())
    layers = [[*layer.parameters()] for layer in found]
    largest = max(layers, key=_bytes, default=[])
    return Sizes(
        trained=_bytes(trained),
        frozen=_bytes(frozen) + buffers,
        trained_divided=_bytes(p for p in trained if p not in whole),
        frozen_divided=_bytes(p for p in frozen if p not in whole),
        frozen_outside=_bytes(p for p in frozen if p not in llm) + buffers,
        layers=sum(map(_bytes, layers)),
        layer=_bytes(largest),
        number=sum(p.numel() for p in trained),
        number_divided=sum(p.numel() for p in parameters if p not in whole),
        number_layer=sum(p.numel() for p in largest),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
