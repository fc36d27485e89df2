"""A run does not go on with other frozen weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmfusion.training import manifest
from mmfusion.training.frozen_weights import fingerprints
from mmfusion.training.rebuild import load_module
from mmfusion.training.resume import by_step
from mmfusion.training.run import RunDirectory
from tests.training import jobs
from tests.training.tiny import fit, losses, refused, write_recipe

ZERO = "--trainer.strategy=mmfusion.training.strategies.zero.ZeRO"
DIVIDED = "--trainer.strategy.config={zero_optimization: {stage3_param_persistence_threshold: 0}}"


class Parts(nn.Module):
    """Two parts, of which nothing trains."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.llm = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30))
        self.model.encoders = nn.ModuleDict({"image": nn.Linear(3, 3)})
        self.requires_grad_(False)
        self.inherited: set[str] = set()


def of(module: Any) -> dict[str, str]:
    return fingerprints(module)


def test_one_value_of_each_tensor_is_enough_and_precision_is_not() -> None:
    module = Parts()
    known = of(module)
    assert set(known) == {"llm", "encoders.image"}
    assert of(Parts().bfloat16()) == of(Parts().double()) == known
    with torch.no_grad():
        module.model.llm[0].weight[0, 0] += 1
    assert of(module)["llm"] != known["llm"]
    assert of(module)["encoders.image"] == known["encoders.image"]
    module = Parts()
    module.model.llm[1].running_mean += 1
    assert of(module)["llm"] != known["llm"], "statistics are weights too"


def test_what_is_kept_in_checkpoints_has_none() -> None:
    module = Parts()
    module.model.encoders["image"].weight.requires_grad_(True)
    module.inherited = {"model.encoders.image.bias"}
    assert set(of(module)) == {"llm"}


def test_quantised_weights_have_one() -> None:
    """As bitsandbytes keeps them: codes, two in a byte."""
    module = Parts()
    for dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        codes = nn.Parameter(torch.arange(600).to(dtype)[:, None], requires_grad=False)
        module.model.llm[0].weight = codes
        known = of(module)["llm"]
        codes.data.view(torch.uint8)[-9 * 9] += 1
        other = codes.data.view(torch.uint8).clone()
        other[0] += 1
        codes.data = other.view(dtype)
        assert of(module)["llm"] != known


def exchange(home: Path) -> None:
    """Other weights of the same shapes, where the recipe's are."""
    (file,) = (home / "llm").glob("*.safetensors")
    weights = load_file(file)
    torch.manual_seed(5)
    other = {name: w + 0.01 * torch.randn_like(w) for name, w in weights.items()}
    save_file(other, file, metadata={"format": "pt"})


@pytest.fixture
def half(tmp_path: Path) -> SimpleNamespace:
    """A run of 4 steps that could go on from the second."""
    recipe = write_recipe(tmp_path, trainer__max_steps=4, checkpoint={"every_n_steps": 2})
    run = fit(recipe)
    by_step(run.checkpoints)[-1].unlink()
    return SimpleNamespace(home=tmp_path, recipe=recipe, run=run)


def test_a_run_does_not_go_on_with_an_exchanged_part(
    half: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    (there,) = by_step(half.run.checkpoints)
    made = manifest.read(there)
    assert made is not None
    exchange(half.home)
    said = refused(capsys, half.recipe)
    assert "frozen weights are others than those that this run has trained with" in said
    assert f"expected {made.about['frozen']['llm']}" in said
    assert "model.llm: fingerprint " in said
    assert "model.encoders.image" not in said
    assert "--allow_recipe_change" in said
    assert by_step(half.run.checkpoints) == [there]
    fit(half.recipe, "--allow_recipe_change")
    assert (
        "frozen weights are others than before"
        in (half.run.path / "attempts" / "0003" / "log.txt").read_text()
    )
    assert losses(half.run, attempt=3).keys() == {2, 3}
    fit(half.recipe, "--trainer.max_steps=5", "--allow_recipe_change")
    log = (half.run.path / "attempts" / "0004" / "log.txt").read_text()
    assert "frozen weights" not in log, "from here on these are its own"


def test_a_run_that_is_used_with_an_exchanged_part_says_so(
    half: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    load_module(half.run.path)
    assert "other frozen weights" not in caplog.text
    exchange(half.home)
    load_module(half.run.path)
    assert "was trained with other frozen weights: model.llm: fingerprint" in caplog.text


@pytest.mark.slow
def test_weights_that_ranks_share_out_have_the_same_one(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, trainer__max_steps=4, checkpoint={"every_n_steps": 2})
    run, log = RunDirectory(tmp_path / "run"), tmp_path / "log"
    args = ["fit", "-c", str(recipe), "--timeout_minutes=1"]
    assert jobs.run(args, log) == 0
    alone = manifest.read(by_step(run.checkpoints)[-1])
    by_step(run.checkpoints)[-1].unlink()
    args += [ZERO, "--trainer.strategy.stage=3", DIVIDED, "--trainer.devices=2"]
    assert jobs.run_ranks(args, log, 2) == [0, 0], log.with_suffix(".0").read_text()
    shared = manifest.read(by_step(run.checkpoints)[-1])
    assert alone is not None
    assert shared is not None
    assert shared.about["strategy"] == "zero stage 3"
    assert shared.about["frozen"] == alone.about["frozen"]
    by_step(run.checkpoints)[-1].unlink()
    exchange(tmp_path)
    assert jobs.run_ranks(args, log, 2) == [1, 1]
    assert "model.llm: fingerprint" in log.with_suffix(".0").read_text()
