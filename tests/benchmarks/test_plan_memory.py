"""The memory that is planned is the memory that is taken, within 15 %."""

from __future__ import annotations

import json

import pytest

from mmfusion.tools.plan.memory import alone
from mmfusion.tools.plan.recipe import plan_recipe
from mmfusion.training.command import RecipeCommand
from mmfusion.training.resume import by_step
from tests.benchmarks.plan_memory import CASES, HERE, MIB, compare


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_planned_memory_is_the_measured_one(tmp_path):
    """On a CPU: 125 M parameters, all of which train, with gradient checkpointing."""
    parts, measured = compare("checkpointed", tmp_path)
    assert parts["total"] == pytest.approx(measured, rel=0.15)
    (saved,) = by_step(tmp_path / "run-checkpointed/checkpoints")
    planned = parts["parameters"] + parts["optimizer"]
    assert saved.stat().st_size / MIB == pytest.approx(planned, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["full", "checkpointed", "lora"])
def test_planned_memory_is_what_cuda_allocates(case, tmp_path):
    """As ``torch.cuda.max_memory_allocated`` counts it, from the second step on."""
    options = ["--trainer.accelerator=gpu", "--trainer.precision=bf16-mixed"]
    arguments = [*CASES[case](tmp_path), *options]
    found = plan_recipe(arguments, world=1)
    file = tmp_path / "allocated"
    callback = {"class_path": f"{HERE}.Allocated", "init_args": {"file": str(file)}}
    callbacks = f"--trainer.callbacks={json.dumps([callback])}"
    RecipeCommand("fit", [*arguments, callbacks, f"--run_dir={tmp_path}/run", "--wandb=off"])
    planned = alone(found.sizes, found.seen).total
    assert planned == pytest.approx(int(file.read_text()), rel=0.15)
