"""Before step 1: what trains, printed and logged; after the first backward pass, whether it can.

What cannot be meant (nothing trains, a policy that matches nothing, new tokens neither trained nor
loaded) the module refuses while it is built.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, astuple, fields
from typing import cast

import lightning as L

from mmfusion import tuning
from mmfusion.training.loggers import wandb_of
from mmfusion.training.module import MultimodalModule

log = logging.getLogger(__name__)


class Audit(L.Callback):
    """Prints part, class, parameters, trainable, dtype and rate; fails where a trainable parameter
    reached no loss.
    """

    def __init__(self) -> None:
        self._reached = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the table before anything is spent."""
        table = cast(MultimodalModule, pl_module).audit
        assert table is not None
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
