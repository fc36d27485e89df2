"""QLoRA: one process, DDP and ZeRO agree; a run is stopped, goes on, is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mmfusion
from mmfusion.models import quantised
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.resume import by_step
from mmfusion.training.run import RunDirectory
from tests.distributed.test_strategies import GIVEN, curve, rows, run, stopped
from tests.models.tiny import save_llm
from tests.training.tiny import losses, write_recipe

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


@pytest.fixture(scope="module")
def recipe(home: Path) -> Path:
    path = save_llm(home / "wide", hidden_size=64, intermediate_size=128)
    return write_recipe(
        home,
        trainer__max_steps=STEPS,
        trainer__gradient_clip_val=0.5,
        model__llm__init_args={
            "path": path,
            "quantization": "nf4",
            "gradient_checkpointing": True,
        },
        model__tuning__llm__init_args__lr=3e-2,
        data__packs_per_micro_batch=1,
        checkpoint__every_n_steps=4,
    )


@pytest.fixture(scope="module")
def alone(home: Path, recipe: Path) -> Path:
    return run(home, recipe, "alone", 1)


@pytest.mark.parametrize("name", ["ddp", "deepspeed_2"])
def test_two_ranks_train_as_one(home, recipe, alone, name):
    found = run(home, recipe, f"on {name}", 2, *GIVEN[name])
    ours, theirs = curve(alone), curve(found)
    assert len(theirs) == STEPS
    assert theirs == pytest.approx(ours, abs=1e-4)
    assert sum(ours[-4:]) < sum(ours[:4]) - 1
    norms = [
        [row["train/grad_norm"] for row in rows(path) if "train/grad_norm" in row]
        for path in (alone, found)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    one, two = (read_checkpoint(by_step(p / "checkpoints")[-1]) for p in (alone, found))
    torch.testing.assert_close(two["state_dict"], one["state_dict"], atol=1e-3, rtol=1e-2)


def test_what_divides_the_weights_is_refused(home, recipe):
    for name, said in (("deepspeed_3", "ZeRO stage 3"), ("fsdp2", "FSDP2")):
        run(home, recipe, f"refused {name}", 1, *GIVEN[name], ends=1)
        assert (
            f"quantization: nf4, but {said} divides" in (home / f"refused {name}.log").read_text()
        )


def test_a_stopped_run_goes_on_exactly(home, recipe, alone):
    stopped(home, recipe, "stopped", 1)
    assert len(curve(home / "stopped")) == 1
    path = run(home, recipe, "stopped", 1, "--resume=must")
    assert losses(RunDirectory(path)) == losses(RunDirectory(alone))


def test_a_checkpoint_holds_adapters_alone_and_is_loaded_beside_quantised_weights(alone):
    path = by_step(alone / "checkpoints")[-1]
    kept = read_checkpoint(path)["state_dict"]
    adapters = {name for name in kept if ".lora_" in name}
    assert len(adapters) == 28
    assert {name.split(".")[1] for name in set(kept) - adapters} == {"input_projectors"}
    assert "float32, nf4" in "".join(p.read_text() for p in alone.glob("attempts/*/log.txt"))

    model = mmfusion.load(alone, device="cpu").model
    half = mmfusion.load(alone, device="cpu", dtype=torch.bfloat16).model
    ids, places = torch.arange(3, 15)[None], torch.arange(12)[None]
    with torch.no_grad():
        ours, theirs = (m.llm.logits(m.llm(m.llm.embed(ids), places, None)) for m in (model, half))
    assert theirs.dtype == torch.bfloat16
    assert float((theirs.float() - ours).norm() / ours.norm()) < 0.05
    layers = quantised.layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        other = half.get_submodule(name)
        assert (layer.compute_dtype, other.compute_dtype) == (torch.float32, torch.bfloat16)
        own, scales = (one.weight.quant_state.as_dict(packed=True) for one in (layer, other))
        torch.testing.assert_close(scales, own, rtol=0, atol=0)
        torch.testing.assert_close(other.weight.data, layer.weight.data, rtol=0, atol=0)
