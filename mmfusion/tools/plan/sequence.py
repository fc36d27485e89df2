"""The ranks that share a pack, rehearsed on one process: what is exchanged has the right size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfusion.models.llms.sequence import SequenceGroup


class RehearsedGroup(SequenceGroup):
    """Its first rank.

    Args:
        size: of the group.
    """

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size

    def exchange(self, flat: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Without values."""
        return _Exchanged.apply(flat.contiguous(), sum(received))  # type: ignore[no-any-return]


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, received: int) -> Tensor:
        ctx.sent = len(flat)
        return flat.new_empty(received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].new_empty(ctx.sent), None
