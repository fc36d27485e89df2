"""Keeps ``status.json`` up to date, and validates by optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L

from mmfusion.data.datamodule import data_of
from mmfusion.training.loggers import STEP, read_metrics
from mmfusion.training.run import Attempt


class RunProgress(L.Callback):
    """Keeps ``status.json`` up to date, gives the loggers the recipe, and counts validations in
    optimizer steps (Lightning counts micro-batches, which depend on the number of ranks).

    Args:
        recipe: the resolved recipe.
        val_every_n_steps: optimizer steps between validations; None leaves it to the trainer.
    """

    def __init__(self, recipe: Mapping[str, Any], val_every_n_steps: int | None = None) -> None:
        self.recipe = dict(recipe)
        self.val_every_n_steps = val_every_n_steps
        self.attempt: Attempt | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the recipe; set the validation interval."""
        if self.val_every_n_steps:
            interval = self.val_every_n_steps * trainer.accumulate_grad_batches
            trainer.val_check_interval = interval  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            logger.log_hyperparams(self.recipe)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make up for the validation of the step the run goes on from, if it was cut off."""
        if self.owes_validation(trainer):
            loop = cast(Any, trainer.fit_loop.epoch_loop)
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True

    def owes_validation(self, trainer: L.Trainer) -> bool:
        """Whether a validation was due at this step and none is in ``metrics.csv``, which other
        loggers do not write; asked of rank 0.
        """
        step, every = trainer.global_step, self.val_every_n_steps
        due = bool(every) and step > 0 and step % cast(int, every) == 0
        owed = False
        if due and trainer.is_global_zero and data_of(trainer).val_sources:
            file = Path(trainer.default_root_dir) / "metrics.csv"
            rows = read_metrics(file, all_attempts=True) if file.exists() else []
            done = any(row.get(STEP) == step - 1 and "val/loss" in row for row in rows)
            owed = bool(rows) and not done
        return due and bool(trainer.strategy.broadcast(owed))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note the step."""
        if self.attempt is not None:
            self.attempt.progress(trainer.global_step)
