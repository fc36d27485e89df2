"""The progress bar: optimizer steps of the run, not micro-batches of an epoch without end."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar


class StepBar(TQDMProgressBar):
    """One bar over ``trainer.max_steps``, beginning where a resumed run begins."""

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Count in steps."""
        super().on_train_start()
        bar = self.train_progress_bar
        bar.reset(trainer.max_steps)
        bar.initial = bar.n = trainer.global_step
        bar.set_description("steps")

    def on_train_epoch_start(self, *_: Any) -> None:
        """An epoch is nothing to the bar; where a run is resumed, it does not even begin."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Move with each whole step."""
        bar, step = self.train_progress_bar, trainer.global_step
        if step > bar.n and self._should_update(step, bar.total):
            bar.n = step
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Without the version number, which is the attempt's."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
