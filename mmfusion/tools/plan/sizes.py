"""What a recipe's weights take, and which of them a strategy may divide."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from mmfusion.training.module import MultimodalModule
from mmfusion.training.strategies.shares import divided_parts, frozen_parts, repeated
from mmfusion.training.strategies.zero import whole_modules


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights, where it does not say otherwise.

    Attributes:
        trained: weights that train.
        frozen: weights that do not, and buffers.
        trained_divided: of the trained ones, those that ZeRO stage 3 divides: the LLM's without its
            output head.
        frozen_divided: of the frozen ones, those that it divides: the LLM's, and those of encoders
            and denoisers that are divided.
        frozen_outside: of the frozen ones, those that nothing divides.
        parts: of all encoders and denoisers that are divided.
        gathered_part: what is gathered of one of them at a time, where that is most.
        layers: of all layers of the LLM.
        layer: of the largest of them.
        number: how many numbers train.
        number_divided: how many are in what ZeRO stage 3 divides.
        number_layers: how many are in the LLM's layers.
        number_layer: how many are in the largest layer.
    """

    trained: int
    frozen: int
    trained_divided: int = 0
    frozen_divided: int = 0
    frozen_outside: int = 0
    parts: int = 0
    gathered_part: int = 0
    layers: int = 0
    layer: int = 0
    number: int = 0
    number_divided: int = 0
    number_layers: int = 0
    number_layer: int = 0


def sizes(
    module: MultimodalModule, together: int = 1, shared: Collection[Tensor] = frozenset()
) -> Sizes:
    """Of a built module, its tuning applied, with the parts divided that it says.

    Args:
        module: whose ``model.divided`` is set.
        together: ranks that compute a layer together.
        shared: the weights of which each of them has a part.
    """

    def number(tensors: Iterable[Tensor]) -> int:
        return sum(t.numel() // (together if t in shared else 1) for t in tensors)

    def size(tensors: Iterable[Tensor]) -> int:
        return sum(number([tensor]) * tensor.element_size() for tensor in tensors)

    model, buffers = module.model, size(module.model.buffers())
    parameters = [*model.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    frozen = [p for p in parameters if not p.requires_grad]
    parts = divided_parts(module)
    outside = {
        p for owner, name in frozen_parts(module) for p in owner.get_submodule(name).parameters()
    }
    whole = {p for part in whole_modules(module) for p in part.parameters(recurse=False)}
    layers = [[*layer.parameters()] for layer in model.llm.layers]
    largest = max(layers, key=size, default=[])
    return Sizes(
        trained=size(trained),
        frozen=size(frozen) + buffers,
        trained_divided=size(p for p in trained if p not in whole),
        frozen_divided=size(p for p in frozen if p not in whole),
        frozen_outside=size(outside) + buffers,
        parts=size(p for part in parts for p in part.parameters()),
        gathered_part=max((_gathered(part) for part in parts), default=0),
        layers=sum(map(size, layers)),
        layer=size(largest),
        number=number(trained),
        number_divided=number(p for p in parameters if p not in whole),
        number_layers=sum(map(number, layers)),
        number_layer=number(largest),
    )


def _gathered(part: nn.Module) -> int:
    """Bytes that are gathered while a divided part runs: what is in none of its blocks, and two of
    these, for the next is on its way.
    """
    blocks = sorted((_bytes(block.parameters()) for block in repeated(part)), reverse=True)
    return _bytes(part.parameters()) - sum(blocks) + sum(blocks[:2])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
