"""What becomes of a step that would do harm: one whose gradients are not finite, or whose loss is
far above those before it.

The module asks before the optimizer's step, with values that are the same on all ranks, so that all
of them do the same.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, cast

import lightning as L
import torch

from mmfusion.data.datamodule import data_of
from mmfusion.training.agreement import gather_to_first
from mmfusion.training.callbacks.run_progress import RunProgress
from mmfusion.training.checkpoint import trained_names
from mmfusion.training.module import MultimodalModule
from mmfusion.training.rewind import Rewind
from mmfusion.types import BatchSample

log = logging.getLogger(__name__)

Action = Literal["fail", "skip", "rewind"]
MOST_NAMED = 32
LEAST_SPREAD = 0.01
"""Of the median: where losses hardly differ (a model that knows its data by heart) none is a spike
that a reader of the curve would not call one.
"""


class Guard(L.Callback):
    """Keeps a step that would do harm out of the weights.

    ``skip`` leaves weights, momentum and running statistics as they were before the step; the step
    counts, and the schedule goes on. ``rewind`` goes back to the last checkpoint, and on behind the
    packs between it and the end of the step: no step trains on them. ``fail`` ends the run.

    Args:
        not_finite: what to do where gradients, or the loss, are not finite. (16-mixed leaves such
            steps out by itself, while it looks for its scale.)
        spike: what to do where the loss is far above those of the steps before; None: nothing.
        deviations: a loss is a spike so many robust standard deviations (1.4826 times the median
            distance from the median, at least 1 % of the median) above the median.
        window: of so many steps, those that were left out not counted; before there are so many
            nothing is a spike.
        most: steps that may be left out, or gone back from, in ``within`` steps; one more ends the
            run.
        within: see ``most``.
    """

    def __init__(
        self,
        not_finite: Action = "skip",
        spike: Action | None = None,
        deviations: float = 8.0,
        window: int = 128,
        most: int = 5,
        within: int = 100,
    ) -> None:
        if not 0 < deviations < math.inf:
            raise ValueError(f"guard.deviations is {deviations}; expected a number above 0.")
        for name, value, least in (("window", window, 8), ("most", most, 0), ("within", within, 1)):
            if value < least:
                raise ValueError(f"guard.{name} is {value}; expected {least} or more.")
        self.not_finite, self.spike = not_finite, spike
        self.deviations, self.window = deviations, window
        self.most, self.within = most, within
        self.losses: deque[float] = deque(maxlen=window)
        """Of the last steps that were no spike."""
        self.skipped: list[int] = []
        """Steps that were left out, of the last ``within``."""
        self.num_skipped = 0
        self._moved: list[torch.Tensor] = []
        self._before: list[torch.Tensor] = []

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the state."""
        return "mmfusion.guard"

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank."""
        return {
            "losses": list(self.losses),
            "skipped": list(self.skipped),
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse; the window may be another."""
        self.losses = deque(state_dict["losses"], maxlen=self.window)
        self.skipped, self.num_skipped = list(state_dict["skipped"]), state_dict["num_skipped"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Be asked by the module."""
        cast(MultimodalModule, pl_module).guard = self

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell what was left out before."""
        trained = trained_names(pl_module)
        self._moved = [buffer for name, buffer in pl_module.named_buffers() if name in trained]
        left_out = data_of(trainer).state.left_out
        if left_out and left_out[-1].step == trainer.global_step:
            _log(trainer, "train/rewinds", len(left_out))
        self._tell(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep running statistics, which the forward passes of the step move."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._before = [buffer.clone() for buffer in self._moved]

    # ---- what the module asks

    def judge(self, module: MultimodalModule, loss: float) -> bool:
        """Whether the step is to be left out because of its loss, which is the same on all ranks.

        Raises:
            Rewind: it is to be gone back from.
            FloatingPointError: the run is to end.
        """
        if self.spike is None or not math.isfinite(loss):
            return False
        limit = highest(self.losses, self.deviations) if self._full else math.inf
        if loss <= limit:
            self.losses.append(loss)
            return False
        middle = statistics.median(self.losses)
        self._leave_out(
            module,
            self.spike,
            f"the loss of optimizer step {module.global_step} is {loss:.6g}, above {limit:.6g} "
            f"(the median of {self.window} steps is {middle:.6g})",
        )
        return True

    def refuse(self, module: MultimodalModule, why: str) -> None:
        """Of a step whose gradients are not finite, on all ranks: returns where it is left out.

        Raises:
            Rewind: it is to be gone back from.
            FloatingPointError: the run is to end.
        """
        self._leave_out(module, self.not_finite, why)

    @property
    def _full(self) -> bool:
        return len(self.losses) == self.window

    def _leave_out(self, module: MultimodalModule, action: Action, why: str) -> None:
        trainer, step, data = module.trainer, module.global_step, data_of(module.trainer)
        samples = _named([*dict.fromkeys(gather_to_first(module.step_samples))])
        before = [*self.skipped, *(x.until for x in data.state.left_out)]
        recent = 1 + sum(other > step - self.within for other in before)
        if action == "fail" or recent > self.most:
            limit = f"Of {self.within} steps {recent} were to be left out, at most {self.most} may "
            raise FloatingPointError(
                f"{why}; no weight was changed by this step. "
                + ("" if action == "fail" else limit + "(guard.most). ")
                + f"Lower the learning rate, set trainer.gradient_clip_val, or look at {samples}"
            )
        told = "the run goes back" if action == "rewind" else "it is left out"
        if trainer.is_global_zero:
            log.warning("%s; %s. Look at %s", why, told, samples)
        if action == "rewind":
            raise Rewind(step, data.state.packs + data.packs_per_step, why)
        for buffer, value in zip(self._moved, self._before, strict=True):
            buffer.copy_(value)
        self.skipped = [other for other in [*self.skipped, step] if other > step - self.within]
        self.num_skipped += 1
        _log(trainer, "train/skipped_steps", self.num_skipped)
        self._tell(trainer)

    def _tell(self, trainer: L.Trainer) -> None:
        """``status.json``."""
        found = []
        if self.num_skipped:
            last = f", the last was {self.skipped[-1]}" if self.skipped else ""
            found.append(f"steps left out: {self.num_skipped}{last}")
        if left_out := data_of(trainer).state.left_out:
            until = left_out[-1].until
            found.append(f"gone back: {len(left_out)} times, the last from step {until}")
        progress = [c for c in cast(Any, trainer).callbacks if isinstance(c, RunProgress)]
        if progress and (attempt := progress[0].attempt) is not None:
            attempt.told = "; ".join(found)


def highest(losses: Sequence[float], deviations: float) -> float:
    """The highest loss that is no spike after these."""
    middle = statistics.median(losses)
    distance = statistics.median(abs(loss - middle) for loss in losses)
    return middle + deviations * max(1.4826 * distance, LEAST_SPREAD * abs(middle))


def _named(samples: Sequence[BatchSample]) -> str:
    names = [f"{s.ref.source}: {s.shard} {s.key}" for s in samples]
    more = [f"and {len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    return "\n  ".join(["its samples:", *names[:MOST_NAMED], *more])


def _log(trainer: L.Trainer, name: str, value: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics({name: float(value)}, step=trainer.global_step)
