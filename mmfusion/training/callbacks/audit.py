"""Before step 1: what trains, printed and logged, and a refusal of what cannot be meant."""

from __future__ import annotations

import logging
from dataclasses import asdict, astuple, fields
from typing import cast

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from mmfusion import tuning
from mmfusion.training.loggers import wandb_of
from mmfusion.training.module import MultimodalModule

log = logging.getLogger(__name__)


class Audit(L.Callback):
    """Prints part, class, parameters, trainable, dtype and rate; fails where nothing trains, a policy
    matched nothing, new tokens neither train nor were loaded, or, after the first backward pass, a
    trainable parameter reached no loss.
    """

    def __init__(self) -> None:
        self._reached = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the table before anything is spent."""
        module = cast(MultimodalModule, pl_module)
        prefix = "model."
        loaded = {name.removeprefix(prefix) for name in module.inherited}
        table = tuning.audit(module.model, module.groups, loaded)
        rank_zero_info(f"\n{table}\n")
        log.info("what trains:\n%s", table)
        if trainer.is_global_zero and (wandb := wandb_of(trainer)) and table.rows:
            columns = [field.name for field in fields(table.rows[0])]
            rows = [list(astuple(row)) for row in table.rows]
            wandb.log_table("audit", columns=columns, data=rows)
        for logger in trainer.loggers:
            logger.log_hyperparams({"audit": {row.part: asdict(row) for row in table.rows}})

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check once that every trainable parameter has a gradient."""
        if not self._reached:
            tuning.check_reaches_loss(cast(MultimodalModule, pl_module).model)
            self._reached = True
