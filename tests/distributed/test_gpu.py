"""One GPU trains as one process on a CPU does: every strategy, in float32 and in bfloat16, with
fused AdamW and flash attention. Skipped where there is no GPU.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import get_args

import pytest
from transformers.utils import is_flash_attn_2_available

from mmfusion.training.run import RunDirectory
from mmfusion.training.strategies.names import Strategy
from tests.training import jobs
from tests.training.tiny import losses, write_recipe

pytestmark = pytest.mark.gpu
STEPS = 20
STRATEGIES = get_args(Strategy)
HALF = ["--trainer.precision=bf16-mixed", "--model.llm.init_args.dtype=bfloat16"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def recipe(home: Path) -> Path:
    """Without dropout, which a GPU draws by a generator of its own."""
    return write_recipe(
        home,
        trainer__max_steps=STEPS,
        trainer__gradient_clip_val=0.5,
        model__input_projectors__image__init_args={"dropout": 0.0},
        model__llm__init_args__gradient_checkpointing=True,
        model__tuning__llm__init_args={"r": 2, "lr": 3e-2, "dropout": 0.0},
        data__packs_per_micro_batch=1,
        checkpoint__every_n_steps=STEPS // 2,
    )


@pytest.fixture(scope="module")
def on_cpu(home: Path, recipe: Path) -> list[float]:
    return run(home, recipe, "cpu", "--trainer.accelerator=cpu")


def run(home: Path, recipe: Path, name: str, *options: str) -> list[float]:
    """Losses of a run on one device."""
    args = ["fit", "-c", str(recipe), f"--run_dir={home}/{name}", "--trainer.accelerator=gpu"]
    code = jobs.run([*args, "--trainer.devices=1", *options], home / f"{name}.log")
    assert code == 0, (home / f"{name}.log").read_text()
    return [float(loss) for _, loss in sorted(losses(RunDirectory(home / name)).items())]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_are_those_of_the_cpu(home, recipe, on_cpu, strategy):
    found = run(home, recipe, strategy, f"--strategy={strategy}")
    assert found == pytest.approx(on_cpu, abs=1e-3)
    assert fmean(found[-5:]) < fmean(found[:5]) - 0.3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bfloat16_stays_near(home, recipe, on_cpu, strategy):
    found = run(home, recipe, f"{strategy} in half", f"--strategy={strategy}", *HALF)
    assert found[:5] == pytest.approx(on_cpu[:5], rel=0.02)
    assert fmean(found[-5:]) < fmean(found[:5]) - 0.3


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_2", "deepspeed_3", "fsdp2"])
def test_fused_adamw_is_adamw(home, recipe, strategy):
    options = [f"--strategy={strategy}", "--model.optimizer=torch.optim.AdamW"]
    found = [
        run(
            home, recipe, f"{strategy}, fused {fused}", *options, f"--model.optimizer.fused={fused}"
        )
        for fused in ("true", "false")
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-3)


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash_attn is not installed")
def test_flash_attention_keeps_packed_samples_apart(home, recipe):
    found = [
        run(home, recipe, kind, *HALF, f"--model.llm.init_args.attention={kind}")
        for kind in ("flash_attention_2", "varlen_sdpa")
    ]
    assert found[0][:5] == pytest.approx(found[1][:5], rel=0.01)


def test_a_run_goes_on_from_the_cpu_to_a_gpu_and_back(home, recipe, on_cpu):
    devices = ["cpu", "gpu", "cpu"]
    for step, device in enumerate(devices, start=1):
        args = ["fit", "-c", str(recipe), f"--run_dir={home}/moves", "--trainer.devices=1"]
        log = home / f"moves{step}.log"
        jobs.run([*args, f"--trainer.accelerator={device}"], log, env={"MMFUSION_DEADLINE": "1"})
        assert len(losses(RunDirectory(home / "moves"))) == step, log.read_text()
    found = [float(loss) for _, loss in sorted(losses(RunDirectory(home / "moves")).items())]
    assert found == pytest.approx(on_cpu[:3], abs=1e-3)
