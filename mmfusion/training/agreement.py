"""What ranks tell one another: rank 0 chooses the checkpoints of a run, for all (two ranks that
look might find two), and a validation gathers what each has found.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning as L
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

T = TypeVar("T")
RESUME_FROM, INIT_FROM = "MMFUSION_RESUME_FROM", "MMFUSION_INIT_FROM"
"""How rank 0 tells the processes it starts which checkpoints it chose."""


def agree(trainer: L.Trainer, variable: str, choose: Callable[[], Path | None]) -> Path | None:
    """What rank 0 chooses, for all.

    Processes that Lightning starts are told by the environment, those of torchrun or Slurm through
    the process group; and all of them where a run begins again in the same processes.
    """
    if dist.is_available() and dist.is_initialized():
        return trainer.strategy.broadcast(choose() if rank() == 0 else None)
    parent, _, told = os.environ.get(variable, "").partition(":")
    if rank() != 0 and parent == str(os.getppid()):  # not left behind by an earlier run
        return Path(told) if told else None
    start = choose() if rank() == 0 else None
    chosen = str(start) if start else ""
    if _started_from_outside(trainer):
        trainer.strategy.setup_environment()
        chosen = trainer.strategy.broadcast(chosen)
    else:
        os.environ[variable] = f"{os.getpid()}:{chosen}"
    return Path(chosen) if chosen else None


def gather(values: list[T]) -> list[T]:
    """Those of all ranks, on all ranks, in the ranks' order. Every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, values)
    return [value for share in found for value in share]


def gather_to_first(values: list[T]) -> list[T]:
    """Those of all ranks, on rank 0 alone, in the ranks' order; nothing elsewhere. Every rank must
    call it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(values, found)
    return [value for share in found or () for value in share]


def rank() -> int:
    """This process's rank, as the launcher's environment says before the process group is made."""
    return int(cast(Any, rank_zero_only).rank)


def _started_from_outside(trainer: L.Trainer) -> bool:
    cluster = getattr(trainer.strategy, "cluster_environment", None)
    return cluster is not None and cluster.creates_processes_externally
