"""``mmfusion plan``: will a recipe fit, how long will it take, and will it start?"""

from __future__ import annotations

import os
import sys

from jsonargparse.typing import OpenUnitInterval, PositiveFloat, PositiveInt
from rich.console import Console

from mmfusion.tools.plan import tables
from mmfusion.tools.plan.checks import Checked, disk, recipe_checks, run_checks
from mmfusion.tools.plan.chosen import title
from mmfusion.tools.plan.gpus import GPU, gpu_of
from mmfusion.tools.plan.memory import Memory
from mmfusion.tools.plan.recipe import Planned, plan_command, precision_of
from mmfusion.tools.plan.rendezvous import Place, meet, meet_here, place_of
from mmfusion.tools.plan.rows import rows
from mmfusion.tools.plan.work import Work, work
from mmfusion.training.callbacks.checkpointing import RunCheckpoint
from mmfusion.training.command import RecipeCommand


def plan(
    recipe: str,
    nodes: PositiveInt = 1,
    gpus: PositiveInt = 8,
    gpu: str = "H100-80GB",
    mfu: OpenUnitInterval = 0.4,
    test: bool = False,
    test_seconds: PositiveFloat = 60.0,
    overrides: list[str] | None = None,
) -> None:
    """Memory of a recipe under each strategy, its days, and what would fail in its first hour.

    No weight is loaded: parts are built without values, and a few optimizer steps rehearsed on the
    first micro-batches of the data. Ends with code 1 where a check failed.

    Args:
        recipe: YAML file or run directory. More of them by ``-c FILE``.
        nodes: machines.
        gpus: of each machine.
        gpu: which, of a table (H100-80GB, H200-141GB, A100-40GB, A100-80GB, L40S-48GB, A10-24GB,
            L4-24GB, V100-32GB, B200-180GB, MI300X-192GB, RTX4090-24GB), or its memory and speed as
            ``80GB@989TFLOPS``.
        mfu: share of the GPUs' speed that is assumed.
        test: have nodes x gpus processes meet: those of the launcher (torchrun, srun) where one
            has started this, else as many on this machine.
        test_seconds: they have for it.
        overrides: recipe values, as ``--data.pack_tokens=4096``.
    """
    world, chosen = nodes * gpus, gpu_of(gpu)
    place = place_of(os.environ) if test else None
    if place is not None and place.rank:
        _meet(place, world, test_seconds)  # rank 0 does the rest
        return
    # First, for the other ranks wait.
    ranks = [("rendezvous", lambda: _meet(place, world, test_seconds))] if test else []
    found = run_checks(ranks)
    command = RecipeCommand("", ["--config", recipe, *(overrides or [])])
    found += run_checks(recipe_checks(command, world))
    report = _Report(command, world, chosen, mfu)
    found += run_checks([("memory", report.memory), ("disk", report.disk)])
    report.console.print(tables.checks_table(found))
    if failed := [check for check in found if not check.passed]:
        _tell(failed)
        raise SystemExit(1)


class _Report:
    """Prints what a recipe needs; its methods are checks."""

    def __init__(self, command: RecipeCommand, world: int, gpu: GPU, mfu: float) -> None:
        self.console = Console(width=None if sys.stdout.isatty() else 120)
        self.command, self.world, self.gpu, self.mfu = command, world, gpu, mfu
        self.saving = _saving(command)
        self.work: Work | None = None

    def memory(self) -> str:
        """Plan the recipe; whether it fits."""
        planned = plan_command(self.command, self.world)
        self.work = self._work(planned)
        half = precision_of(self.command) == "bf16-mixed"
        found = rows(planned, self.world, half)
        self._show(planned, self.work, found)
        own = title(planned.strategy) if planned.strategy else None
        return tables.memory_problem(found, self.gpu, own)

    def disk(self) -> str:
        """Whether the checkpoints have room."""
        size, steps = (self.work.checkpoint, self.work.steps) if self.work else (0, None)
        return disk(self.command.config.run_dir, size, self.saving, steps)

    def _work(self, planned: Planned) -> Work:
        packs, given = self.command.datamodule.packs_per_step, planned.given
        return work(
            planned.seen,
            planned.sizes,
            planned.frozen_parts,
            micro_batches=packs / given.packs,
            tokens=packs * given.pack_tokens,
            steps=planned.steps,
            gpu=self.gpu,
            gpus=self.world,
            mfu=self.mfu,
            inherited=planned.inherited,
        )

    def _show(self, planned: Planned, done: Work, found: list[Memory]) -> None:
        self.console.print(tables.memory_table(found, self.gpu, self.world))
        self.console.print(tables.MEMORY_NOTE, soft_wrap=True)
        self.console.print(tables.activations_table(planned))
        every = self.saving.every_n_steps
        for line in tables.work_lines(done, self.gpu, self.world, self.mfu, every):
            self.console.print(line, soft_wrap=True)
        for note in planned.notes:
            self.console.print(f"Note: {note}", soft_wrap=True)


def _meet(place: Place | None, world: int, seconds: float) -> str:
    if place is None:
        return meet_here(world, seconds)
    if place.world != world:
        raise ValueError(
            f"the launcher has started {place.world} processes. Expected: --nodes x --gpus = "
            f"{world}. Do this: give the launcher and the plan the same numbers."
        )
    return meet(place, seconds)


def _saving(command: RecipeCommand) -> RunCheckpoint:
    """The recipe's checkpoint callback."""
    given = command.config_init.trainer.get("callbacks") or []
    own = [callback for callback in given if isinstance(callback, RunCheckpoint)]
    return own[0] if own else command.config_init.checkpoint


def _tell(failed: list[Checked]) -> None:
    """What failed, unbroken, to the error stream."""
    for check in failed:
        print(f"mmfusion plan: {check.name} failed: {check.said}", file=sys.stderr)
