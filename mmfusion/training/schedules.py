"""Learning rate by optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class WarmupDecay:
    """Linear warmup from 0, then a decay to ``final_ratio`` of each group's rate.

    Args:
        warmup_steps: optimizer steps of warmup; None takes 3 % of the run.
        final_ratio: rate at the last step, as a share of the highest.
        decay: along half a cosine, or a straight line.
    """

    warmup_steps: int | None = None
    final_ratio: float = 0.1
    decay: Literal["cosine", "linear"] = "cosine"

    def factor(self, step: int, total_steps: int) -> float:
        """What the rates are multiplied by in optimizer step ``step`` (from 0)."""
        warmup = self.warmup_steps if self.warmup_steps is not None else round(0.03 * total_steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
        left = 1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_ratio + (1 - self.final_ratio) * left

    def check(self, total_steps: int | None) -> None:
        """Refuse a run whose length is not known, or shorter than its warmup.

        Raises:
            ValueError: naming the recipe's key.
        """
        if total_steps is None or total_steps <= 0:
            raise ValueError(
                f"the learning rate falls over the whole run, but trainer.max_steps is "
                f"{total_steps}: set trainer.max_steps to the number of optimizer steps."
            )
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"model.schedule.final_ratio is {self.final_ratio}; expected 0 to 1.")
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= total_steps:
            raise ValueError(
                f"model.schedule.warmup_steps is {self.warmup_steps}, the run has "
                f"trainer.max_steps {total_steps}: expected 0 to {total_steps} (for a short try: "
                "--model.schedule.warmup_steps=0)."
            )

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        """The scheduler of a run of ``total_steps`` optimizer steps (see :meth:`check`)."""
        self.check(total_steps)
        return LambdaLR(optimizer, lambda step: self.factor(step, total_steps))
