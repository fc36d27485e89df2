"""Fingerprints of what does not train.

A checkpoint keeps what trains alone; the rest is loaded again from where the recipe names it. What
is there then may be other weights of the same shapes: the run would go on, and be worse for it,
without a word. So each checkpoint carries a fingerprint of every frozen part.

It is of some values of each tensor: no file is read for it, and it does not matter in what files
the weights are, nor on what device. Values are rounded to bfloat16 first: a strategy that keeps
parts in another precision changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmfusion.training.checkpoint import trained_names

if TYPE_CHECKING:
    from mmfusion.training.module import MultimodalModule

SAMPLES = 64
"""Values of each tensor."""
DEPTHS = {"llm": 1, "generators": 3}
"""Of parts in the names of weights; a generator's modules are loaded as they are needed."""


def fingerprints(module: MultimodalModule, leads: bool = True) -> dict[str, str]:
    """Of each frozen part, or the frozen weights of a part that trains else.

    Args:
        module: built. Where its weights are divided among the ranks, every rank must call it.
        leads: whether this rank needs the answer.

    Returns:
        By part (``llm``, ``encoders.image``, ``generators.image.vae``), 16 hexadecimal digits. A
        part whose outputs are stored has none here: ``data.features`` has its own.
    """
    found: dict[str, _Digest] = {}
    for name, tensor in _frozen(module):
        with _whole(tensor) as whole:
            if leads:
                found.setdefault(_part_of(name), _Digest()).add(whole)
    return {part: digest.text() for part, digest in found.items()}


def divided(module: MultimodalModule) -> bool:
    """Whether ranks hold shares of frozen weights."""
    return any(_is_divided(tensor) for _, tensor in _frozen(module))


def other_weights(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """A line for every part that has other weights than it had."""
    return [
        f"model.{part}: fingerprint {here[part]}, expected {known}"
        for part, known in there.items()
        if here.get(part, known) != known
    ]


class _Digest:
    """Of the tensors of a part, in their order; their names differ with what wraps them."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.values: dict[torch.dtype, list[Tensor]] = {}

    def add(self, tensor: Tensor) -> None:
        flat, count = tensor.detach().reshape(-1), min(tensor.numel(), SAMPLES)
        if flat.element_size() == 1:  # of what is quantised, the codes
            flat = flat.view(torch.uint8)
        places = torch.arange(count, device=flat.device) * tensor.numel() // max(count, 1)
        kind = torch.bfloat16 if flat.is_floating_point() else torch.int64
        self.shapes.append(tuple(tensor.shape))
        self.values.setdefault(kind, []).append(flat[places].to(kind))

    def text(self) -> str:
        digest = hashlib.sha256(repr(self.shapes).encode())
        for kind in (torch.bfloat16, torch.int64):
            if values := self.values.get(kind):  # one copy from the device for each
                digest.update(torch.cat(values).cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def _frozen(module: MultimodalModule) -> Iterator[tuple[str, Tensor]]:
    """Those that checkpoints do not keep."""
    kept = trained_names(module) | module.inherited
    state = module.state_dict(keep_vars=True)
    for named in (module.named_parameters(), module.named_buffers()):
        for name, tensor in named:
            if name.startswith("model.") and name in state and name not in kept:
                yield name, tensor


def _part_of(name: str) -> str:
    keys = name.split(".")[1:]
    return ".".join(keys[: DEPTHS.get(keys[0], 2)])


def _is_divided(tensor: Any) -> bool:
    return isinstance(tensor, DTensor) or _is_away(tensor)


def _is_away(tensor: Any) -> bool:
    """Whether DeepSpeed has given it away."""
    return hasattr(tensor, "ds_id") and tensor.numel() == 0 and tensor.ds_numel > 0


@contextmanager
def _whole(tensor: Any) -> Iterator[Tensor]:
    if isinstance(tensor, DTensor):
        yield tensor.full_tensor()
    elif _is_away(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
    else:
        yield tensor
