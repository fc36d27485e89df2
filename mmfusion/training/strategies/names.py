"""``strategy: deepspeed_3``: strategies by one word, as a recipe or ``--strategy`` gives them."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.strategies import StrategyRegistry

from mmfusion.training.strategies.fsdp2 import FSDP2
from mmfusion.training.strategies.zero import ZeRO

Strategy = Literal[
    "ddp",
    "deepspeed_1",
    "deepspeed_2",
    "deepspeed_3",
    "deepspeed_2_offload",
    "deepspeed_3_offload",
    "fsdp2",
]
OURS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "deepspeed_1": (ZeRO, {"stage": 1}),
    "deepspeed_2": (ZeRO, {"stage": 2}),
    "deepspeed_3": (ZeRO, {"stage": 3}),
    "deepspeed_2_offload": (ZeRO, {"stage": 2, "offload": "cpu"}),
    "deepspeed_3_offload": (ZeRO, {"stage": 3, "offload": "cpu"}),
    "fsdp2": (FSDP2, {}),
}
"""All but Lightning's own ``ddp``."""


def register() -> None:
    """Let Lightning's trainer know them, also as ``trainer.strategy``."""
    for name, (kind, options) in OURS.items():
        if name not in StrategyRegistry.available_strategies():
            StrategyRegistry.register(name, kind, **options)
