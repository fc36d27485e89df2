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

from mmfusion.cli import main
from mmfusion.training.command import RecipeCommand
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
    if earlier := content["model"]["init_from"]:
        starts = [r for r in RECIPES if merged(*configs(r))["run_dir"] == earlier]
        assert starts, f"{recipe}: no recipe writes the run {earlier} that init_from names"
        two_steps(starts[0])
    fill(content)
    main(["fit", *_given(files), *TWO_STEPS, *_narrow(content)])
    return RunDirectory(content["run_dir"])


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


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: str(r.relative_to(ROOT / "recipes")))
def test_every_recipe_trains_two_steps(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMFUSION_CACHE", str(tmp_path / "cache"))
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
