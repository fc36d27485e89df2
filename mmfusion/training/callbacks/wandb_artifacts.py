"""Hands a run's checkpoints and weights to W&B, where that is asked for, with what they came of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L

from mmfusion.data.datamodule import data_of
from mmfusion.training.checkpoint import LATEST
from mmfusion.training.lineage import Lineage, lineage_of
from mmfusion.training.module import MultimodalModule
from mmfusion.training.resume import by_step
from mmfusion.training.run import RunDirectory
from mmfusion.training.wandb_artifacts import log_checkpoint, log_model, use_inputs, wait_for
from mmfusion.training.wandb_run import RunWandb, wandb_of

ArtifactChoice = Literal["none", "model", "last", "all"]


class WandbArtifacts(L.Callback):
    """Notes where the run comes from, and logs artifacts to its W&B, if it has one.

    Args:
        choice: ``none``; ``model``: the trained weights at the run's end; ``last``: the last
            checkpoint as well, with the optimizer's state; ``all``: every checkpoint.
        recipe: the resolved recipe.
        patience: most seconds to wait for uploads at the end, for which all ranks wait.
    """

    def __init__(
        self, choice: ArtifactChoice, recipe: Mapping[str, Any], patience: float = 480.0
    ) -> None:
        self.choice, self.recipe, self.patience = choice, dict(recipe), patience
        self._told = ""
        self._lineage: Lineage | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note what the run is made of."""
        if not trainer.is_global_zero:
            return
        run = RunDirectory(trainer.default_root_dir)
        began_with = cast(MultimodalModule, pl_module).init_from
        lineage = lineage_of(run, self.recipe, data_of(trainer).sources, began_with)
        self._lineage, self._told = lineage, _latest(run)
        if logger := wandb_of(trainer):
            logger.log_hyperparams({"lineage": lineage.plain()})
            if self.choice != "none":
                logger.attempted(lambda: use_inputs(logger.experiment, run, lineage))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log the checkpoint of the step before."""
        if self.choice == "all" and trainer.is_global_zero:
            run = RunDirectory(trainer.default_root_dir)
            if (name := _latest(run)) != self._told:
                self._told = name
                self._log(trainer, lambda logger, lineage: log_checkpoint(
                    logger.experiment, run.checkpoints / name, lineage
                ))  # fmt: skip

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what the run has come to."""
        run = RunDirectory(trainer.default_root_dir)
        if self.choice == "none" or not trainer.is_global_zero or not by_step(run.checkpoints):
            return
        newest, logged = by_step(run.checkpoints)[-1], []

        def log(logger: RunWandb, lineage: Lineage) -> None:
            if self.choice != "model":
                logged.append(log_checkpoint(logger.experiment, newest, lineage))
            logged.append(log_model(logger.experiment, run, newest, lineage))
            wait_for(logger.experiment, logged, self.patience)

        self._log(trainer, log)

    def _log(self, trainer: L.Trainer, log: Callable[[RunWandb, Lineage], None]) -> None:
        logger, lineage = wandb_of(trainer), self._lineage
        if logger is not None and lineage is not None:
            logger.attempted(lambda: log(logger, lineage))


def _latest(run: RunDirectory) -> str:
    """The name of the newest checkpoint; empty before the first."""
    pointer: Path = run.checkpoints / LATEST
    return pointer.read_text().strip() if pointer.is_file() else ""
