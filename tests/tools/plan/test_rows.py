"""The table has the recipe's own strategy as it is configured, and says what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmfusion.tools.plan.gpus import gpu_of
from mmfusion.tools.plan.memory import Memory
from mmfusion.tools.plan.recipe import Planned, plan_recipe
from mmfusion.tools.plan.rows import own_row, rows
from mmfusion.tools.plan.tables import memory_problem
from tests.training.tiny import write_recipe

STRATEGIES = "mmfusion.training.strategies"
WORDS = (
    "ddp", "deepspeed_1", "deepspeed_2", "deepspeed_3", "deepspeed_2_offload",
    "deepspeed_3_offload", "fsdp2",
)  # fmt: skip
LLM = {"quantization": "nf4"}


def given(kind: str, **options: Any) -> str:
    """The option of a strategy with options of its own."""
    name = {"ZeRO": "zero.ZeRO", "FSDP2": "fsdp2.FSDP2"}[kind]
    made = {"class_path": f"{STRATEGIES}.{name}", "init_args": options}
    return f"--trainer.strategy={json.dumps(made)}"


def planned(folder: Path, *options: str, world: int = 2, **changes: Any) -> Planned:
    path = write_recipe(folder, **changes)
    return plan_recipe(["--config", str(path), *options], world, on_gpu=False)


def named(found: Planned, world: int = 2) -> dict[str, Memory]:
    return {row.strategy: row for row in rows(found, world)}


def test_a_strategy_by_its_word_has_the_row_of_that_word(tmp_path):
    found = planned(tmp_path, "--strategy=deepspeed_3")
    assert tuple(named(found)) == WORDS
    assert own_row(found, 2) == named(found)["deepspeed_3"]
    assert not any(row.refused for row in named(found).values())


def test_stage_1_with_offload_has_a_row_and_is_held_against_the_gpu(tmp_path):
    found = planned(tmp_path, given("ZeRO", stage=1, offload="cpu"))
    table = named(found)
    assert tuple(table) == (*WORDS, "deepspeed_1_offload")
    own = table["deepspeed_1_offload"]
    assert own.gradients == 4 * found.sizes.number  # whole on each rank, unlike stage 2's
    assert own.optimizer == 0 < table["deepspeed_1"].optimizer
    assert own.host >= table["deepspeed_1"].optimizer
    with pytest.raises(ValueError, match=r"trainer.strategy deepspeed_1_offload: it takes"):
        memory_problem([*table.values()], gpu_of("1GB@1TFLOPS"), own.strategy)


def test_divided_encoders_are_divided_in_the_recipes_row_alone(tmp_path):
    found = planned(tmp_path, given("FSDP2", divide_encoders=True))
    table = named(found)
    own, plain = table["fsdp2 (divide_encoders)"], table["fsdp2"]
    assert found.own_sizes.parts > 0 == found.sizes.parts
    assert plain.frozen - own.frozen == found.own_sizes.parts // 2
    three = planned(tmp_path, given("ZeRO", stage=3, divide_encoders=True))
    table = named(three)
    own, plain = table["deepspeed_3 (divide_encoders)"], table["deepspeed_3"]
    assert plain.frozen - own.frozen == found.own_sizes.parts // 2


def test_buckets_of_the_recipe_are_those_of_its_row(tmp_path):
    config = {"zero_optimization": {"reduce_bucket_size": 1000, "sub_group_size": 10**6}}
    found = planned(tmp_path, given("ZeRO", stage=2, config=config))
    table = named(found)
    assert table["deepspeed_2 (config)"].transient < table["deepspeed_2"].transient
    (said,) = [note for note in found.notes if "zero_optimization" in note]
    assert said == (
        "config.zero_optimization: what sub_group_size of the recipe changes is not counted."
    )


def test_layers_that_ranks_compute_together_are_a_part_on_each(tmp_path):
    options = [given("FSDP2", tensor_parallel=2)]
    full = {"class_path": "mmfusion.tuning.Full", "init_args": {"lr": 1e-3}}
    found = planned(tmp_path, *options, model__tuning__llm=full)
    linear, layers = found.sizes.layers - found.own_sizes.layers, found.sizes.layers
    assert 0.45 * layers < linear < 0.5 * layers  # all but the norms
    own = named(found)["fsdp2 (tensor_parallel: 2)"]
    # On two ranks nothing is left to divide what is in no layer.
    assert own.parameters == found.sizes.trained - linear
    assert own.gradients == pytest.approx(own.parameters, abs=1)
    assert own.optimizer == pytest.approx(2 * own.parameters, rel=0.01)
    (said,) = [note for note in found.notes if note.startswith("tensor_parallel")]
    assert "activations within a layer are counted whole" in said


def test_a_part_of_the_layers_that_cannot_be_made_is_refused(tmp_path):
    found = planned(tmp_path, given("FSDP2", tensor_parallel=8), world=8)
    table = named(found, 8)
    own = table["fsdp2 (tensor_parallel: 8)"]
    assert "does not divide" in own.refused
    assert not table["fsdp2"].refused
    with pytest.raises(ValueError, match="refuses the recipe: tensor_parallel is 8"):
        memory_problem([*table.values()], gpu_of("H100-80GB"), own.strategy)


def test_a_quantised_llm_is_refused_where_it_would_be_divided(tmp_path):
    llm = {"path": str(tmp_path / "llm"), **LLM}
    found = planned(tmp_path, "--strategy=fsdp2", model__llm__init_args=llm)
    table = named(found)
    assert {name for name, row in table.items() if row.refused} == {
        "deepspeed_3", "deepspeed_3_offload", "fsdp2",
    }  # fmt: skip
    gpu = gpu_of("H100-80GB")
    assert not table["fsdp2"].fits(gpu.memory)
    said = memory_problem([*table.values()], gpu, "ddp")
    assert said == "fits: ddp, deepspeed_1, deepspeed_2, deepspeed_2_offload"
    with pytest.raises(ValueError, match=r"fsdp2 refuses the recipe: .*quantization: nf4, but"):
        memory_problem([*table.values()], gpu, "fsdp2")


def test_a_precision_that_zero_does_not_train_in_is_refused(tmp_path):
    found = planned(tmp_path, "--trainer.precision=16-mixed")
    refused = {name for name, row in named(found).items() if row.refused}
    assert refused == {name for name in WORDS if name.startswith("deepspeed")}


def test_a_strategy_that_is_not_planned_is_said(tmp_path):
    found = planned(tmp_path, "--trainer.strategy=fsdp")
    assert own_row(found, 2) is None
    said = memory_problem(rows(found, 2), gpu_of("H100-80GB"), "fsdp")
    assert said.endswith("trainer.strategy fsdp is none that is planned: its memory is not known")
