"""The page on scaling says what its formulas give, and these what two processes hand over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mmfusion.training.loggers import read_metrics
from tests.benchmarks import mid_size, scaling
from tests.benchmarks.communication import count
from tests.models.tiny import llama_config

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.mark.parametrize("make", scaling.TABLES)
def test_the_page_has_the_tables_that_the_formulas_give(make):
    assert make() in PAGE.read_text()


@pytest.mark.parametrize("llm", [scaling.SMALL, scaling.LARGE], ids=["7B", "70B"])
def test_parameters_are_those_of_the_models(llm):
    heads = llm.hidden // 128
    config = llama_config(
        vocab_size=llm.vocabulary,
        hidden_size=llm.hidden,
        intermediate_size=llm.inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=llm.kv // 128,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == llm.layer + llm.rest
    linear = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(m.in_features + m.out_features for m in linear) == sum(map(sum, llm.linear))
    assert llm.parameters == llm.layers * llm.layer + llm.rest


M = 2
"""Micro-batches of a rank and step."""
THREE = [
    "--trainer.strategy=mmfusion.training.strategies.zero.ZeRO",
    "--trainer.strategy.stage=3",
]
NOTHING_LIVE = (
    "{zero_optimization: {stage3_param_persistence_threshold: 0, stage3_max_live_parameters: 0, "
    "stage3_max_reuse_distance: 0}}"
)
GIVEN = {
    "ddp": ["--strategy=ddp"],
    "deepspeed_1": ["--strategy=deepspeed_1"],
    "deepspeed_2": ["--strategy=deepspeed_2"],
    "deepspeed_3": [*THREE, f"--trainer.strategy.config={NOTHING_LIVE}"],
    "fsdp2": ["--strategy=fsdp2"],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that are large beside flags and norms."""
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256}
    return mid_size.write(tmp_path_factory.mktemp("scaling"), **sizes, num_hidden_layers=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", GIVEN)
def test_the_formulas_give_what_two_processes_hand_to_collectives(tmp_path, recipe, name):
    found, size = count(str(recipe), [*GIVEN[name], "--data.packs_per_step=4"], tmp_path / "run")
    trained, layers = size["trained"], size["its layers"]
    outside = trained - size["trained in the LLM"]
    expected = {
        "ddp": {"all-reduce": trained},
        "deepspeed_1": {"all-reduce": trained, "all-gather": trained},
        "deepspeed_2": {"all-reduce": M * trained, "all-gather": trained},
        "deepspeed_3": {
            "all-gather": M * (2 * layers + size["LLM"] - layers - size["its head"])
            + size["its head"]
            + outside,
            "reduce-scatter": M * trained,
        },
        "fsdp2": {
            "all-gather": M * (2 * layers + size["LLM"] - layers + outside),
            "reduce-scatter": M * trained,
        },
    }
    del found["small"]
    assert found == pytest.approx(expected[name], rel=0.03)


@pytest.mark.slow
def test_ranks_that_share_packs_exchange_what_attention_takes(tmp_path, recipe):
    """Queries, keys, values and what comes of them, in each layer, there and back."""
    options = ["--strategy=ddp", "--sequence_parallel=2", "--data.packs_per_step=4"]
    found, size = count(str(recipe), options, tmp_path / "run")
    (row, *_) = [
        row
        for row in read_metrics(tmp_path / "run" / "run" / "metrics.csv")
        if "throughput/tokens_per_s" in row
    ]
    tokens = round(row["throughput/tokens_per_s"] * row["throughput/step_s"])  # of a step
    heads, keys, width, layers = 8, 8, 16, 3
    numbers = layers * 2 * (2 * heads + 2 * keys) * width * tokens / 2
    assert found["all-to-all"] == pytest.approx(4 * numbers, rel=0.01)  # parts differ by a token
    assert found["all-reduce"] == size["trained"]
