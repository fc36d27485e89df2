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
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmfusion.cli import main
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


def merged(files: list[Path]) -> dict[str, Any]:
    """What the files say together, as far as parts and data go."""
    recipe: dict[str, Any] = {}
    for file in files:
        _merge(recipe, yaml.safe_load(file.read_text()))
    return recipe


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def two_steps(recipe: Path) -> RunDirectory:
    """Run a recipe in this folder; first the one whose run it starts from."""
    files = configs(recipe)
    content = merged(files)
    if earlier := content["model"].get("init_from"):
        starts = [r for r in RECIPES if merged(configs(r))["run_dir"] == earlier]
        assert starts, f"{recipe}: no recipe writes the run {earlier} that init_from names"
        two_steps(starts[0])
    fill(content)
    given = [word for file in files for word in ("-c", str(file))]
    main(["fit", *given, *TWO_STEPS, *_narrow(content)])
    return RunDirectory(content["run_dir"])


def _narrow(content: dict[str, Any]) -> list[str]:
    """Output projectors are not read from disk, so they would have their full size, and read layers
    that a tiny LLM does not have.
    """
    sizes = {"dim": 16, "heads": 2, "ffn_dim": 32, "layers": [-1, 1]}
    return [
        f"--model.output_projectors.{modality}.init_args.{name}={size}"
        for modality, part in content["model"].get("output_projectors", {}).items()
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
    if merged(configs(recipe))["data"].get("val_sources"):
        assert any(row.get("val/loss") for row in rows)
    assert (run.checkpoints / "step-00000002.ckpt").is_file()
