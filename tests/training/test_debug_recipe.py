"""recipes/debug.yaml, as its first lines say it is run."""

import csv
from pathlib import Path

import pytest

from mmfusion.cli import main
from mmfusion.training.rebuild import load_module
from tests.make_debug import make_debug

RECIPE = Path(__file__).parents[2] / "recipes" / "debug.yaml"


@pytest.mark.slow
def test_the_debug_recipe_learns_to_see_colours(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFUSION_CACHE", str(tmp_path))
    make_debug(tmp_path / "debug")
    run = tmp_path / "run"
    main(["fit", "-c", str(RECIPE), f"--run_dir={run}", "--trainer.enable_progress_bar=false"])
    with (run / "metrics.csv").open(newline="") as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert len(losses) == 3
    assert losses[-1] < 1.0
    assert load_module(run, step=60).model.llm.model is not None
