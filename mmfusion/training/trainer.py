"""The trainer of a command: Lightning's, as the recipe says, with our callbacks and checkpoint
files, and with as many processes as the launcher has started.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from torch.distributed.constants import default_pg_timeout

from mmfusion.training.callbacks.start_timer import StartTimer
from mmfusion.training.callbacks.step_bar import StepBar
from mmfusion.training.checkpoint import AtomicCheckpointIO
from mmfusion.training.recipe_parser import RecipeError
from mmfusion.training.strategies import names as strategies

TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10 if torch.cuda.is_available() else 1,  # each waits for the GPU
    "enable_model_summary": False,
    "accelerator": "auto",
}

OTHERWISE_COUNTED = {
    "min_steps": ("None",),
    "min_epochs": ("None",),
    "limit_train_batches": ("None", "1.0"),
    "overfit_batches": ("0.0", "0"),
    "fast_dev_run": ("False", "0"),
}
"""Options of the trainer that would end a run, or keep it from ending, against the data's steps,
each with its values that do nothing."""


def make_trainer(
    config: Any, callbacks: Sequence[L.Callback], loggers: list[Any], trains: bool
) -> L.Trainer:
    """Make it.

    Args:
        config: the recipe, its classes made.
        callbacks: of the command; one of the same class in ``trainer.callbacks`` takes its place.
        loggers: named in the recipe.
        trains: whether the command is ``fit``.

    Raises:
        RecipeError: where the recipe's ``trainer`` cannot be meant.
    """
    given = dict(config.trainer)
    _check(given)
    given["default_root_dir"] = config.run_dir
    given["strategy"] = _strategy(config.strategy, given.get("strategy"))
    given["plugins"] = [*as_list(given.get("plugins")), AtomicCheckpointIO()]
    if TorchElasticEnvironment.detect():
        given |= _processes(given, "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    elif SLURMEnvironment.detect():
        given["plugins"].append(SLURMEnvironment(auto_requeue=False))  # saving, exit are ours
        given |= _processes(given, "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
    given["logger"] = loggers or False
    given["callbacks"] = _callbacks(given, callbacks)
    given.pop("max_time", None)
    given["enable_checkpointing"] = trains
    if config.val_every_n_steps:
        given["check_val_every_n_epoch"] = None
    try:
        trainer = L.Trainer(**given)
    except (MisconfigurationException, TypeError) as error:
        raise RecipeError(f"the recipe's trainer cannot be made: {error}") from error
    # What nobody has set is half an hour.
    if getattr(trainer.strategy, "_timeout", None) == default_pg_timeout:
        cast(Any, trainer.strategy)._timeout = timedelta(minutes=config.timeout_minutes)
    return trainer


def _check(given: Mapping[str, Any]) -> None:
    precision = str(given.get("precision"))
    if precision.endswith("-true") and precision != "32-true":
        raise RecipeError(
            f"trainer.precision is {precision}, which rounds positions and loses small "
            "updates; use bf16-mixed (parts are loaded in their own dtype)."
        )
    if odd := [k for k, idle in OTHERWISE_COUNTED.items() if str(given.get(k)) not in idle]:
        raise RecipeError(
            f"trainer.{odd[0]} is {given[odd[0]]}; a run is counted in optimizer steps, and "
            "ends at trainer.max_steps or with data.epochs. Use these (a try of two steps: "
            "--trainer.max_steps=2 --model.schedule.warmup_steps=0 --run_dir=/tmp/try)."
        )


def _strategy(short: str | None, given: Any) -> Any:
    """By the one word, or as ``trainer.strategy`` has it."""
    strategies.register()
    if short and given not in (None, "auto"):
        raise RecipeError(
            f"strategy is {short} and trainer.strategy is set as well; give one of them."
        )
    return short or given or "auto"


def _callbacks(given: Mapping[str, Any], ours: Sequence[L.Callback]) -> list[L.Callback]:
    found = as_list(given.get("callbacks"))
    kinds = {type(callback) for callback in found}
    found += [callback for callback in ours if type(callback) not in kinds]
    if limit := given.get("max_time"):
        found.append(StartTimer(limit))
    own_bar = any(isinstance(callback, ProgressBar) for callback in found)
    if given.get("enable_progress_bar") is not False and not own_bar:
        found.append(StepBar())
    return found


def _processes(given: Mapping[str, Any], world: str, local: str) -> dict[str, int]:
    """Devices of each node, and nodes, as the launcher's environment says.

    Lightning wants to be told: with too few of them each process would take itself for a run of its
    own, in the same directory.

    Raises:
        RecipeError: where the recipe says otherwise.
    """
    processes, each = int(os.environ[world]), int(os.environ.get(local) or 1)
    started = {"devices": each, "num_nodes": processes // each}
    for name, value in started.items():
        idle = {"None", "auto", "-1", str(value), "1" if name == "num_nodes" else "auto"}
        if str(given.get(name)) not in idle:
            raise RecipeError(
                f"trainer.{name} is {given[name]}, but the launcher has started {processes} "
                f"processes, {each} a node ({world}, {local}); leave trainer.devices and "
                "trainer.num_nodes out."
            )
    return started


def as_list(value: Any) -> list[Any]:
    """One thing, several, or none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
