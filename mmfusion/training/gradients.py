"""Norms of gradients, also where ranks share them on several meshes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """() the 2-norm of all of them, the same on every rank."""
    norms = [torch.nn.utils.get_total_norm(found) for found in by_mesh(gradients)]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if not whole:
        return torch.zeros(())
    return cast(Tensor, torch.linalg.vector_norm(torch.stack(whole)))


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """PyTorch's own functions over many tensors take those of one mesh."""
    found: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(found.values())


def clip_by_norm(optimizer: torch.optim.Optimizer, limit: float) -> None:
    """As ``torch.nn.utils.clip_grad_norm_``."""
    held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = total_norm(p.grad for p in held if p.grad is not None)
    for group in by_mesh(held):
        torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
