"""What tensor parallelism refuses to divide; how long its groups wait."""

from __future__ import annotations

from datetime import timedelta

import lightning as L
import pytest
import torch
import torch.distributed as dist
from transformers import ApertusConfig, PhiConfig

from mmfusion.models.llms.hf_causal_lm import HFCausalLM
from mmfusion.training.strategies.fsdp2 import FSDP2
from mmfusion.training.strategies.tensor import _refuse_between
from tests.models.llms.test_hf_causal_lm import SIZE
from tests.models.tiny import save_llm


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (PhiConfig(**SIZE, qk_layernorm=True), "self_attn.q_layernorm.weight"),
        (ApertusConfig(**SIZE), "mlp.act_fn.alpha_p"),
    ],
)
def test_what_trains_beside_divided_layers_is_refused(tmp_path, config, name):
    """Each rank has a part of its gradient, which nothing sums."""
    llm = HFCausalLM(save_llm(tmp_path, config))
    llm.build()
    llm.requires_grad_(False)
    layer, plan = llm.layers[0], llm.tensor_plan(2)
    _refuse_between(layer, plan)
    layer.get_parameter(name).requires_grad_(True)
    with pytest.raises(ValueError, match=f"{name} trains, .* is not summed"):
        _refuse_between(layer, plan)


def test_the_mesh_waits_as_long_as_the_recipe_says(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "0")
    trainer = L.Trainer(strategy=FSDP2(), devices=1, accelerator="cpu", logger=False)
    trainer.strategy._timeout = timedelta(minutes=3)
    trainer.strategy.setup_environment()
    try:
        for name in ("data_parallel", "tensor_parallel"):
            group = trainer.strategy.device_mesh.get_group(name)
            options = group._get_backend(torch.device("cpu")).options
            assert options._timeout == timedelta(minutes=3)
    finally:
        dist.destroy_process_group()
