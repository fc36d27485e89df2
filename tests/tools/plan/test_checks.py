"""Every check fails on what it is there for, and says what, got, expected, do this."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmfusion.data.converters.caption import Caption
from mmfusion.data.source import Source
from mmfusion.models.encoders.hf_vision import HFVision
from mmfusion.models.llms.hf_causal_lm import HFCausalLM
from mmfusion.tools.plan import checks
from mmfusion.tools.plan.checks import CheckError, recipe_checks, run_checks
from mmfusion.training.callbacks.checkpointing import RunCheckpoint
from mmfusion.training.command import RecipeCommand
from tests.models.tiny import save_clip, save_llm
from tests.training.tiny import TinyConverter, write_recipe, write_shards

SAYS = r"(?s).*: .*Expected: .*Do this: "


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checks")
    save_llm(folder / "llm")
    save_clip(folder / "clip")
    write_shards(folder, "train", 12)
    return folder


@pytest.fixture
def llm(home, tmp_path) -> Path:
    return Path(shutil.copytree(home / "llm", tmp_path / "llm"))


def weights(path: Path) -> str:
    return checks.weights(HFCausalLM(str(path)), None)  # type: ignore[arg-type]


def test_a_batch_that_divides_passes():
    assert checks.batch(32, 2, 8) == "32 packs = 8 ranks x 2 micro-batches of 2"


@pytest.mark.parametrize(("packs", "micro", "world", "each"), [(20, 1, 8, 16), (6, 1, 8, 8)])
def test_a_batch_that_does_not_divide_fails(packs, micro, world, each):
    with pytest.raises(CheckError, match=SAYS + rf"set data.packs_per_step to {each},"):
        checks.batch(packs, micro, world)


def test_ranks_without_a_lane_of_their_own_fail():
    assert checks.lanes(64, 64) == "64 for 64 ranks"
    with pytest.raises(CheckError, match=SAYS + "set data.lanes to 128; a run that has begun"):
        checks.lanes(64, 65)


def test_ranks_that_share_packs_are_given_them_as_one():
    assert checks.batch(2, 1, 8, 4) == "2 packs = 2 groups of 4 ranks x 1 micro-batches of 1"
    assert checks.lanes(2, 8, 4) == "2 for 2 groups of 4 ranks"
    with pytest.raises(CheckError, match=SAYS + "set data.packs_per_step to 2,"):
        checks.batch(3, 1, 8, 4)
    with pytest.raises(CheckError, match=SAYS + "set data.lanes to 2; a run that has begun"):
        checks.lanes(1, 8, 4)
    with pytest.raises(CheckError, match=r"groups of 4 .*Expected: a multiple of 4\."):
        checks.batch(2, 1, 6, 4)


SHARED = {
    "sequence_parallel": ["--sequence_parallel=2"],
    "tensor_parallel": [
        "--trainer.strategy=mmfusion.training.strategies.fsdp2.FSDP2",
        "--trainer.strategy.tensor_parallel=2",
    ],
}


@pytest.mark.parametrize("option", [*SHARED])
def test_a_recipe_whose_ranks_share_packs_passes(option, tmp_path):
    """Four packs on eight ranks, two of which are given the same ones: four lanes are enough."""
    recipe = write_recipe(tmp_path, data__packs_per_micro_batch=1, data__lanes=4)
    command = RecipeCommand("", ["--config", str(recipe), *SHARED[option]])
    found = {check.name: check for check in run_checks(recipe_checks(command, 8))}
    assert found["batch"].said == "4 packs = 4 groups of 2 ranks x 1 micro-batches of 1"
    assert found["batch"].passed
    assert found["lanes"].passed


def test_whole_weights_pass(home):
    assert "MiB" in weights(home / "llm")
    assert "MiB" in checks.weights(HFVision(str(home / "clip")), None)  # type: ignore[arg-type]


def test_weights_that_are_not_there_fail(llm):
    (llm / "model.safetensors").unlink()
    with pytest.raises(CheckError, match=SAYS + "get the weights of .* again"):
        weights(llm)


def test_weights_that_are_cut_off_fail(llm):
    file = llm / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckError, match=SAYS) as error:
        weights(llm)
    assert "cannot be read" in str(error.value)


def test_a_part_of_the_weights_that_is_missing_fails(llm):
    save_file({"a": torch.zeros(1)}, llm / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (llm / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckError, match=r"1 of 2 files are missing \(model-00002-of-00002"):
        weights(llm)


def test_weights_of_a_hub_that_is_not_asked_fail(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckError, match="not in the hub's cache, and HF_HUB_OFFLINE is set"):
        weights(Path("nobody/nothing"))


def test_weights_in_the_hubs_cache_pass(home, tmp_path, monkeypatch):
    """Laid out as the hub's library does."""
    import huggingface_hub.constants

    snapshot = tmp_path / "models--tiny--llm/snapshots/abc"
    shutil.copytree(home / "llm", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert checks._cached("tiny/llm", None, [""]) == snapshot
    assert checks._cached("tiny/llm", None, ["unet"]) is None


def test_shards_that_can_be_read_pass(home):
    source = Source(str(home / "train-*.tar"), TinyConverter())
    assert checks.shards(source) == "12 samples in 1 shards"


def test_shards_that_are_not_there_fail(home):
    with pytest.raises(ValueError, match="nothing"):
        checks.shards(Source(str(home / "nothing-*.tar"), TinyConverter()))


def test_a_shard_without_its_index_fails(home, tmp_path):
    shard = shutil.copy(home / "train-000000.tar", tmp_path)
    with pytest.raises(ValueError, match="mmfusion data index"):
        checks.shards(Source(shard, TinyConverter()))


def test_a_shard_of_another_size_than_its_index_fails(home, tmp_path):
    for file in home.glob("train-*"):
        shutil.copy(file, tmp_path)
    shard = tmp_path / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:2048])
    with pytest.raises(ValueError, match="index"):
        checks.shards(Source(str(shard), TinyConverter()))


def test_a_converter_of_other_records_fails(home):
    with pytest.raises(CheckError, match=SAYS + "look at the shard"):
        checks.shards(Source(str(home / "train-*.tar"), Caption()))


def test_a_stage_before_that_is_not_there_fails(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model.init_from .*no such file or folder"):
        checks.earlier(str(tmp_path / "stage1"))


def test_a_disk_that_is_too_small_fails(tmp_path):
    told = checks.disk(str(tmp_path / "a/run"), 1 << 20, RunCheckpoint(), 1000)
    assert "3 checkpoints of 0.00 GiB" in told
    with pytest.raises(CheckError, match=SAYS + "free some"):
        checks.disk(str(tmp_path / "a/run"), 1 << 60, RunCheckpoint(), 1000)


def test_checkpoints_that_stay_for_good_count_on_disk(tmp_path):
    saving = RunCheckpoint(every_n_steps=100, keep_every_n_steps=250)  # 500, 1000
    assert checks.disk(str(tmp_path), 1, saving, 1000).count("5 checkpoints") == 1


def test_a_run_directory_that_is_a_file_fails(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(CheckError, match=SAYS + "change --run_dir"):
        checks.disk(str(tmp_path / "run/one"), 1, RunCheckpoint(), 1)


def test_wandb_without_a_login_fails_where_it_has_to_be_online(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(CheckError, match=r"no API key .*Do this: `wandb login`"):
        checks.wandb(str(tmp_path), "online", "p")
    assert checks.wandb(str(tmp_path), "auto", "p").startswith("offline (no API key")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    with pytest.raises(CheckError, match=r"did not answer"):
        checks.wandb(str(tmp_path), "online", "p")
    assert checks.wandb(str(tmp_path), "off", "p") == "off"


def test_all_checks_run_where_some_fail(tmp_path):
    recipe = write_recipe(tmp_path, data__packs_per_step=3, model__init_from=str(tmp_path / "no"))
    (tmp_path / "llm/model.safetensors").unlink()
    (tmp_path / "words-000000.tar.idx").unlink()
    found = run_checks(recipe_checks(RecipeCommand("", ["--config", str(recipe)]), 2))
    assert {check.name: check.passed for check in found} == {
        "batch": False,
        "lanes": True,
        "schedule": True,
        "tokenizer": True,
        "weights of llm": False,
        "model.init_from": False,
        "data.sources.train": True,
        "data.sources.words": False,
        "W&B": True,
    }


def test_a_tokenizer_that_is_not_there_and_a_run_without_an_end_fail(tmp_path):
    recipe = write_recipe(tmp_path, trainer__max_steps=-1)
    (tmp_path / "llm/tokenizer.json").unlink()
    (tmp_path / "llm/tokenizer_config.json").unlink()
    found = run_checks(recipe_checks(RecipeCommand("", ["--config", str(recipe)]), 1))
    said = {check.name: check.said for check in found if not check.passed}
    assert set(said) == {"schedule", "tokenizer"}
    assert "has no tokenizer" in said["tokenizer"]
    assert "set trainer.max_steps" in said["schedule"]
