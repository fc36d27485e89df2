"""Every recipe under ``recipes/`` trains two steps on tiny parts and data, by its own command.

Parts and shards lie where the recipe looks for them (``tests/recipes/tiny_cache.py``), so nothing
of a recipe is replaced but the number of steps. A new recipe is picked up by itself.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
import shlex
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfusion.cli import main
from mmfusion.tools.describe import description
from mmfusion.training.command import RecipeCommand
from mmfusion.training.module import adamw
from mmfusion.training.run import RunDirectory
from tests.recipes.tiny_cache import fill

ROOT = Path(__file__).parents[2]
PARTS = sorted(ROOT.glob("recipes/**/*parts.yaml"))
"""What several recipes share; each is laid under them by their commands."""
SMALL_GENERATORS = set(ROOT.glob("recipes/**/generators/*.yaml"))
"""Recipes of another command: tests/tools/test_train_generator.py."""
RECIPES = sorted(set(ROOT.glob("recipes/**/*.yaml")) - set(PARTS) - SMALL_GENERATORS)
TWO_STEPS = [
    "--trainer.max_steps=2",
    "--trainer.enable_progress_bar=false",
    "--model.schedule.warmup_steps=1",
    "--model.compile=false",  # tests/training/test_module.py compiles; here it is too slow
    "--val_every_n_steps=2",
    "--wandb=off",
]


def configs(recipe: Path) -> list[Path]:
    """The recipes that the command in the file's first comment puts together."""
    comment = itertools.takewhile(lambda line: line[0] == "#", recipe.read_text().splitlines())
    header = " ".join(line.lstrip("# ").rstrip("\\") for line in comment)
    command = re.search(r"mmfusion fit( +-c \S+)+", header)
    assert command, f"{recipe}: the first comment shows no `mmfusion fit -c ...` to run it with"
    words = shlex.split(command[0])
    return [ROOT / word for word in words if word.endswith(".yaml")]


class Parsed(RecipeCommand):
    """Recipes put together by the command's own parser; nothing is made of them."""

    def instantiate_classes(self) -> None:
        """Not here."""


@cache
def merged(*files: Path) -> dict[str, Any]:
    """What the files say together, defaults filled in."""
    found = Parsed("", _given(files))
    return {"run_dir": found.config.run_dir, **found.recipe()}


def _given(files: Iterable[Path]) -> list[str]:
    return [word for file in files for word in ("-c", str(file))]


def two_steps(recipe: Path) -> RunDirectory:
    """Run a recipe in this folder; first the one whose run it starts from."""
    files = configs(recipe)
    content = merged(*files)
    run = RunDirectory(content["run_dir"])
    if run.status().get("state") == "finished":  # another recipe began from it
        return run
    if earlier := content["model"]["init_from"]:
        starts = [r for r in RECIPES if merged(*configs(r))["run_dir"] == earlier]
        assert starts, f"{recipe}: no recipe writes the run {earlier} that init_from names"
        two_steps(starts[0])
    fill(content)
    main(["fit", *_given(files), *TWO_STEPS, *_narrow(content)])
    return run


def _narrow(content: dict[str, Any]) -> list[str]:
    """Output projectors are not read from disk, so they would have their full size, and read layers
    that a tiny LLM does not have.
    """
    sizes = {"dim": 16, "heads": 2, "ffn_dim": 32, "layers": [-1, 1]}
    return [
        f"--model.output_projectors.{modality}.init_args.{name}={size}"
        for modality, part in (content["model"]["output_projectors"] or {}).items()
        if part["class_path"].endswith(".QueryDecoder")
        for name, size in sizes.items()
    ]


def test_there_are_recipes():
    assert ROOT / "recipes" / "debug.yaml" in RECIPES
    assert len(RECIPES) >= 10


@pytest.mark.parametrize("parts", PARTS, ids=lambda r: str(r.relative_to(ROOT / "recipes")))
def test_shared_parts_are_shared(parts):
    assert sum(parts in configs(recipe) for recipe in RECIPES) >= 2


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: str(r.relative_to(ROOT / "recipes")))
def test_the_first_comment_names_the_recipe_itself(recipe):
    assert configs(recipe)[-1] == recipe


NEXT_GPT = ROOT / "recipes" / "next_gpt"
PUBLISHED: dict[str, dict[str, Any]] = {
    "1_align_input": {"lr": 4e-4, "batch": 18, "samples": 40_000},
    "2_align_output": {"lr": 4e-4, "batch": 18, "samples": 180_000},
    "3_instruct": {"lr": 5e-4, "batch": 16, "samples": 250_000},
}
"""Of NExT-GPT's three stages, by its code of the time of the paper (arXiv:2309.05519)."""


def policies(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of each policy of a recipe, by its part and class."""
    found = {}
    for part, given in content["model"]["tuning"].items():
        for policy in given if isinstance(given, list) else [given]:
            found[f"{part}/{policy['class_path'].rsplit('.', 1)[-1]}"] = policy["init_args"]
    return found


@pytest.mark.parametrize("stage", PUBLISHED)
def test_next_gpt_has_the_published_numbers(stage):
    content = merged(*configs(NEXT_GPT / f"{stage}.yaml"))
    numbers, trained = PUBLISHED[stage], policies(content)
    parts = {
        "1_align_input": {"input_projectors/Full"},
        "2_align_output": {"output_projectors/Full", "llm/NewTokens"},
        "3_instruct": {
            "input_projectors/Full", "output_projectors/Full", "llm/LoRA", "llm/NewTokens",
        },
    }  # fmt: skip
    assert set(trained) == parts[stage]
    assert {policy["lr"] for policy in trained.values()} == {numbers["lr"]}
    assert all(p["weight_decay"] == 1e-3 for n, p in trained.items() if "NewTokens" not in n)
    assert content["data"]["packs_per_step"] == numbers["batch"]
    steps = content["trainer"]["max_steps"]
    assert steps * numbers["batch"] == pytest.approx(numbers["samples"], rel=0.02)  # one epoch
    schedule = content["model"]["schedule"]
    assert (schedule["decay"], schedule["final_ratio"]) == ("linear", 0.0)
    assert schedule["warmup_steps"] == pytest.approx(0.1 * steps)
    assert content["trainer"]["gradient_clip_val"] == 1.0
    options = adamw([torch.nn.Parameter(torch.zeros(1))]).defaults
    assert (options["betas"], options["eps"]) == ((0.9, 0.95), 1e-8)


def test_next_gpt_has_the_published_output_side():
    for stage, video in (("2_align_output", 1.0), ("3_instruct", 2.0)):
        model = merged(*configs(NEXT_GPT / f"{stage}.yaml"))["model"]
        assert model["signal_tokens"] == {"image": 4, "video": 24, "audio": 8}
        sizes = {"dim": 512, "encoder_layers": 4, "decoder_layers": 4, "heads": 4, "ffn_dim": 2048}
        for projector in model["output_projectors"].values():
            given = projector["init_args"]
            assert projector["class_path"].endswith(".QueryDecoder")
            assert {name: given[name] for name in sizes} == sizes
            assert (list(given["layers"]), given["add_embeddings"]) == ([-1], True)
        kinds = {
            m: part["class_path"].rsplit(".", 1)[-1] for m, part in model["generators"].items()
        }
        assert kinds == {"image": "StableDiffusion", "video": "TextToVideoSD", "audio": "AudioLDM"}
        aims = {
            part["init_args"]["modality"]: part["init_args"]
            for name, part in model["objectives"].items()
            if name != "next_token"
        }
        assert {m: aim["distance"] for m, aim in aims.items()} == dict.fromkeys(kinds, "l2")
        weights = {m: aim["weight"] for m, aim in aims.items()}
        assert weights == {"image": 1.0, "audio": 1.0, "video": video}
        assert set(model["objectives"]) == {"next_token", *(f"align_{m}" for m in kinds)}
    lora = policies(merged(*configs(NEXT_GPT / "3_instruct.yaml")))["llm/LoRA"]
    assert (lora["r"], lora["alpha"], lora["dropout"]) == (32, 32, 0.1)
    assert lora["targets"] == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_fault_2_stage_2_of_next_gpt_trains_all_three_projectors(tmp_path, monkeypatch):
    """There, its script trains that of sounds alone."""
    monkeypatch.chdir(tmp_path)
    files = configs(NEXT_GPT / "2_align_output.yaml")
    content = merged(*files)
    fill(content)
    given = [*_given(files[1:]), *_narrow(content), "--model.init_from=null"]
    rows = {row.name: row for row in description(str(files[0]), given).parts}
    for modality in ("image", "video", "audio"):
        assert rows[f"output_projectors.{modality}"].trainable > 0
        assert rows[f"output_projectors.{modality}"].trainable == (
            rows[f"output_projectors.{modality}"].parameters
        )
        assert rows[f"input_projectors.{modality}"].trainable == 0
    assert rows["llm"].trainable > 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: str(r.relative_to(ROOT / "recipes")))
def test_fault_8_no_recipe_names_devices(recipe):
    """There, the scripts are for one or two GPUs, by their numbers. How many is another thing."""
    devices = merged(*configs(recipe))["trainer"]["devices"]
    assert devices == "auto" or isinstance(devices, int)


def test_recipes_are_put_together_as_the_command_does_it(tmp_path):
    """Another class does not take over what the one before it was given."""
    path = "model: {llm: {class_path: mmfusion.models.llms.hf_causal_lm.HFCausalLM"
    (tmp_path / "more.yaml").write_text(f"{path}, init_args: {{path: other}}}}}}")
    projector = "model: {input_projectors: {image: {class_path: mmfusion.models.projectors.%s}}}"
    (tmp_path / "class.yaml").write_text(projector % "linear.Linear")
    debug = ROOT / "recipes" / "debug.yaml"
    model = merged(debug, tmp_path / "more.yaml", tmp_path / "class.yaml")["model"]
    assert model["llm"]["init_args"]["path"] == "other"
    image = model["input_projectors"]["image"]
    assert image["class_path"].endswith(".Linear")
    assert "depth" not in image["init_args"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where all recipes run: each once, whatever begins from it."""
    return tmp_path_factory.mktemp("recipes")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: str(r.relative_to(ROOT / "recipes")))
def test_every_recipe_trains_two_steps(recipe, home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("MMFUSION_CACHE", str(home / "cache"))
    run = two_steps(recipe)
    status = run.status()
    assert (status["state"], status["step"]) == ("finished", 2)
    with (run.path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    train = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(train) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in train)
    if merged(*configs(recipe))["data"]["val_sources"]:
        assert any(row.get("val/loss") for row in rows)
    assert (run.checkpoints / "step-00000002.ckpt").is_file()
