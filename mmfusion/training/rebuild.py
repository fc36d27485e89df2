"""From a recipe, or the recipe and weights of a run, to module and data without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities.seed import isolate_rng

from mmfusion.data.datamodule import MultimodalData
from mmfusion.paths import expand
from mmfusion.training.command import RecipeCommand
from mmfusion.training.module import MultimodalModule
from mmfusion.training.resume import by_step, complete_checkpoint, step_of
from mmfusion.training.run import RunDirectory


def from_recipe(
    path: str, overrides: Sequence[str] = ()
) -> tuple[MultimodalModule, MultimodalData]:
    """The module and the data of a recipe, without a trainer and without weights.

    Args:
        path: the recipe, or the ``config.yaml`` of a run.
        overrides: as on the command line, e.g. ``["--data.pack_tokens=512"]``.

    Raises:
        ValueError: where the recipe or an override is wrong.
    """
    command = RecipeCommand("", ["--config", str(path), *overrides])
    return command.model, command.datamodule


def load_module(run_dir: str | Path, step: int | None = None) -> MultimodalModule:
    """A run's module, built from its ``config.yaml``, with its trained weights.

    Args:
        run_dir: the run directory.
        step: the checkpoint of this optimizer step; None takes the newest complete one.

    Raises:
        FileNotFoundError: where there is no such run or checkpoint.
    """
    run = RunDirectory(expand(run_dir))
    if not run.config.is_file():
        raise FileNotFoundError(
            f"{run.path} is not a run directory: it has no {run.config.name}. Give the directory "
            "that `mmfusion fit` wrote (run_dir in the recipe)"
            + "".join(f"; {config.parent} is one" for config in run.path.glob("*/config.yaml"))
            + "."
        )
    there = {step_of(path): path for path in by_step(run.checkpoints)}
    if step is not None and step not in there:
        raise FileNotFoundError(
            f"{run.path} has no checkpoint of step {step}; it has {list(there)}."
        )
    path = complete_checkpoint(run.path if step is None else there[step], "loading")
    with isolate_rng():
        # What was trained on stored features is used on new media.
        module = RecipeCommand("", ["--config", str(run.config)], stored=False).model
        module.restore(path)
    return module
