"""What the other machines of a run do (processors, memory, network, GPUs), in the same W&B run.

W&B measures the machine of the process that logs, which is rank 0's. So on each other machine the
first process begins a segment of the same run that holds such measurements alone, under the label
``node-1``, ``node-2``, ...: by W&B's shared mode where it is online, else offline to be sent with
the others.
"""

from __future__ import annotations

import logging
from typing import Any

import lightning as L

from mmfusion.training.secrets import hide_secrets
from mmfusion.training.wandb_run import wandb_of
from mmfusion.training.wandb_segment import Segment, begin

log = logging.getLogger(__name__)


class NodeMetrics(L.Callback):
    """Keeps a segment of the run's W&B open on every machine but the first."""

    def __init__(self) -> None:
        self._run: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Every rank asks rank 0 which run it is, where there are several machines."""
        if trainer.num_nodes < 2:
            return
        logger = wandb_of(trainer)
        run_id: str = trainer.strategy.broadcast(logger.segment.run_id if logger else "")
        if logger is None or not run_id or trainer.node_rank == 0 or trainer.local_rank != 0:
            return
        ours = logger.segment
        segment = Segment(
            ours.run_dir, run_id, ours.name, ours.project, ours.choice, ours.timeout,
            trainer.node_rank, trainer.num_nodes,
        )  # fmt: skip
        try:
            self._run, where = begin(segment)
        except Exception as error:  # what it measures is worth no run
            told = hide_secrets(f"{type(error).__name__}: {error}")
            log.warning("W&B does not see node %d (%s)", trainer.node_rank, told)
        else:
            log.info("W&B's measurements of node %d are %s", trainer.node_rank, where)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close it."""
        self._close(0)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Close it."""
        self._close(1)

    def _close(self, code: int) -> None:
        run, self._run = self._run, None
        try:
            if run is not None:
                run.finish(exit_code=code)
        except Exception as error:
            log.warning("W&B could not be closed: %s", hide_secrets(str(error)))
