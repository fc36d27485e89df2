"""The run's one curve in Weights & Biases, over all its starts.

The axis is the trainer's step; what a start logs again after a crash carries its number
(``trainer/attempt``). Where an earlier start was cut off, what it left on the disk is sent first
(:mod:`mmfusion.training.wandb_gap`). Nothing here stops a run: what W&B cannot take is told, and
``metrics.csv`` has it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from mmfusion.training.loggers import ATTEMPT, STEP
from mmfusion.training.secrets import hide_secrets
from mmfusion.training.wandb_gap import fill, send_offline
from mmfusion.training.wandb_segment import FOLDER, Segment, begin, server, why_not_online

RESTARTS = 3
"""Segments that may break under a run before it goes on without W&B."""


class RunWandb(WandbLogger):
    """Lightning's W&B logger, kept inside the run directory and never in the way.

    Args:
        run_dir: the run directory.
        run_id: W&B id, the same after a resume.
        attempt: which start of the run this is.
        choice: ``auto``, ``online`` or ``offline``.
        project: W&B project.
        timeout: seconds to wait for the server to answer.
        nodes: machines of the run; with several the others add what they do
            (:class:`mmfusion.training.callbacks.node_metrics.NodeMetrics`).
    """

    def __init__(
        self,
        run_dir: str | Path,
        run_id: str,
        attempt: int = 1,
        choice: Literal["auto", "online", "offline"] = "auto",
        project: str = "mmfusion",
        timeout: float = 5.0,
        nodes: int = 1,
    ) -> None:
        path = Path(run_dir).absolute()
        super().__init__(name=path.name, save_dir=str(path), id=run_id, project=project)
        self.segment = Segment(path, run_id, path.name, project, choice, timeout, 0, nodes)
        self.attempt = attempt
        self._broken = 0

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started at first use."""
        if self._experiment is None:
            self._start()
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log the recipe, with keys, tokens and passwords hidden."""
        plain = vars(params) if isinstance(params, Namespace) else params
        hidden = hide_secrets(plain)
        self.attempted(lambda: WandbLogger.log_hyperparams(self, hidden))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        told = {**metrics, ATTEMPT: self.attempt}
        self.attempted(lambda: WandbLogger.log_metrics(self, told, step))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close this segment of the run; a later metric opens the next one under the same id."""
        if self._experiment is not None:
            run, self._experiment = self._experiment, None
            try:
                run.finish(exit_code=0 if status == "success" else 1)
            except Exception as error:
                self._tell(error)

    def attempted(self, log: Callable[[], None]) -> None:
        """Do what logs something. Where W&B's service is gone, another segment is begun."""
        while self._broken < RESTARTS:
            try:
                return log()
            except Exception as error:  # its service was killed, its disk is full
                self._broken += 1
                self._tell(error)
                self._abandon()

    def _tell(self, error: Exception) -> None:
        left = RESTARTS - self._broken
        then = "begun anew" if left else "given up for this start of the run"
        told = hide_secrets(f"{type(error).__name__}: {error}")
        rank_zero_warn(f"W&B failed ({told}) and is {then}; metrics.csv has every metric.")

    def _abandon(self) -> None:
        import wandb

        self._experiment = None
        try:
            wandb.teardown()
        except Exception as error:
            rank_zero_warn(f"W&B could not be closed: {type(error).__name__}: {error}")

    def _start(self) -> None:
        segment = self.segment
        if why_not_online(segment.choice, host := server(), segment.timeout) is None:
            send_offline(segment.run_dir, host)
        run, where = begin(segment)
        self._experiment = run
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        run.config.update({"attempt": self.attempt}, allow_val_change=True)
        if where.startswith("online"):
            fill(run, segment.run_dir, self.attempt)
        elif segment.choice == "online":
            rank_zero_warn(f"W&B was asked to be online, but is {where}")
        rank_zero_info(f"W&B is {where}; files in {segment.run_dir / FOLDER}")


def wandb_of(trainer: L.Trainer) -> RunWandb | None:
    """The run's W&B logger, if it has one (for tables and other things only W&B shows)."""
    return next((logger for logger in trainer.loggers if isinstance(logger, RunWandb)), None)
