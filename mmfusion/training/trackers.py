"""Where the metrics of a run go: ``metrics.csv`` always, W&B and TensorBoard as asked."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from mmfusion.training.loggers import MetricsCSV
from mmfusion.training.wandb_run import RunWandb
from mmfusion.training.wandb_segment import WandbChoice


def default_loggers(
    run_dir: str | Path,
    run_id: str,
    attempt: int = 1,
    wandb: WandbChoice = "auto",
    project: str = "mmfusion",
    timeout: float = 5.0,
    tensorboard: bool = False,
    nodes: int = 1,
    step: int = 0,
) -> list[Logger]:
    """The loggers of a run. Makes no file and contacts nobody until the first metric.

    Args:
        run_dir: the run directory; everything is written below it.
        run_id: the run's stable id, the same after a resume.
        attempt: which start of this run this is, from 1; logged beside every metric.
        wandb: ``auto`` is online where a key is set and the server answers, else offline;
            ``online`` warns where that cannot be and goes on offline; ``offline``; ``off``.
        project: W&B project.
        timeout: seconds to wait for the W&B server to answer.
        tensorboard: write ``tensorboard/`` as well.
        nodes: machines of the run.
        step: that this start goes on from.
    """
    loggers: list[Logger] = [MetricsCSV(run_dir, attempt)]
    if wandb not in ("auto", "online", "offline", "off"):
        raise ValueError(f"wandb is {wandb!r}; expected auto, online, offline or off.")
    if wandb != "off" and os.environ.get("WANDB_MODE") != "disabled":
        loggers.append(RunWandb(run_dir, run_id, attempt, wandb, project, timeout, nodes))
    if tensorboard:
        if not (find_spec("tensorboard") or find_spec("tensorboardX")):
            raise ValueError(
                "tensorboard is true, but the package is not installed: pip install tensorboard, "
                "or leave tensorboard out; metrics.csv has every metric."
            )
        # Steps that are logged again replace those of the start before.
        again: dict[str, Any] = {"purge_step": step} if attempt > 1 else {}
        loggers.append(TensorBoardLogger(run_dir, "tensorboard", "", **again))
    return loggers
