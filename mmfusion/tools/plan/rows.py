"""The rows of the table of memory: each strategy by its one word, and the recipe's own as it is
configured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmfusion.tools.plan.chosen import is_ddp, title, zero_fields
from mmfusion.tools.plan.memory import Memory, ddp, fsdp2, strategies, zero
from mmfusion.tools.plan.recipe import Planned
from mmfusion.tools.plan.rehearsal import Rehearsal
from mmfusion.training.strategies.fsdp2 import FSDP2
from mmfusion.training.strategies.zero import ZeRO


def rows(planned: Planned, world: int, half: bool = False) -> list[Memory]:
    """A row a strategy; the recipe's own in the place of the one of its name, or last.

    Args:
        planned: the recipe.
        world: ranks.
        half: ``trainer.precision`` is ``bf16-mixed``.
    """
    found = {row.strategy: row for row in strategies(planned.sizes, planned.seen, world, half)}
    if own := own_row(planned, world, half):
        found[own.strategy] = own
    return [replace(row, refused=planned.refused.get(name, "")) for name, row in found.items()]


def own_row(planned: Planned, world: int, half: bool = False) -> Memory | None:
    """That of the recipe's strategy; None where it names none that is planned."""
    given, sizes, seen = planned.strategy, planned.own_sizes, planned.seen
    if isinstance(given, ZeRO):
        offload = given.offload is not None
        row = zero(given.stage, sizes, seen, world, offload, zero_fields(given))
    elif isinstance(given, FSDP2):
        together = given.tensor_parallel
        share = sizes.number / max(1, planned.sizes.number)
        row = fsdp2(
            sizes, _part(seen, share), world // together, half, given.offload, given.reshard
        )  # fmt: skip
    elif is_ddp(given):
        row = ddp(sizes, seen, world)
    else:
        return None
    return replace(row, strategy=title(given))


def _part(seen: Rehearsal, share: float) -> Rehearsal:
    """Of a rank that trains a share of the numbers."""
    sizes: dict[str, Any] = {
        name: round(getattr(seen, name) * share)
        for name in ("gradients", "optimizer", "step", "flat_step")
    }
    return replace(seen, **sizes)
