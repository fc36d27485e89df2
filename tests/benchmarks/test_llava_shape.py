"""The benchmark of LLaVA's shape, at a size for CPUs; as published where there is a GPU for it."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.llava_shape import WARMUP, measure, save_weights
from tests.benchmarks.published_sizes import save_pairs


@pytest.mark.slow
def test_rates_and_flops_are_found(tmp_path):
    save_pairs(tmp_path)
    save_weights(tmp_path, layers=2, width=256)
    options = ["--trainer.precision=32-true", "--trainer.accelerator=cpu", "--data.num_workers=0"]
    options += [
        "--model.llm.init_args.dtype=float32",
        "--model.llm.init_args.path=" + str(tmp_path / "llm"),
    ]
    options += ["--model.encoders.image.init_args.dtype=float32"]
    found = measure(tmp_path, "1GB@1TFLOPS", None, 1, WARMUP + 3, *options)
    assert found["tokens_per_s"] * found["step_s"] <= 2048
    parameters = 2 * (4 * 256**2 + 3 * 256 * 688)
    least = 4 * parameters * 1500 / 1e12  # forward, and backward to the hidden states
    assert least < found["tflops_of_a_step"] < 20 * least
    assert found["mfu"] == pytest.approx(found["tflops_of_a_step"] / found["step_s"])


@pytest.mark.gpu
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy", [None, "deepspeed_2", "deepspeed_3", "fsdp2"])
def test_a_gpu_is_kept_busy(tmp_path, strategy):
    """An eighth of the layers; the memory is the planned one."""
    save_pairs(tmp_path)
    save_weights(tmp_path, layers=4, width=4096)
    found = measure(tmp_path, "H100-80GB", strategy, 4, 20)
    assert found["mfu"] > 0.2 or "H100" not in torch.cuda.get_device_name()
    if strategy is None:
        assert found["planned_gib"] == pytest.approx(found["allocated_gib"], rel=0.15)
