"""``mmfusion launch`` reads a recipe as ``mmfusion fit`` will, before anything is submitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmfusion.cli import main
from mmfusion.training.command import ReadRecipe

RECIPES = Path(__file__).parents[3] / "recipes"


def code_of(*words: str) -> int:
    try:
        main(["launch", *words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("name", ["debug.yaml", "quickstart/2_align_output.yaml"])
def test_neither_data_nor_weights_nor_the_stage_before_need_to_be_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    options = ["--data.pack_tokens=512", f"--run_dir={tmp_path}/run"]
    read = ReadRecipe(["-c", str(RECIPES / name), *options])
    assert read.config.data.pack_tokens == 512
    assert [*tmp_path.iterdir()] == [], "nothing is made"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--trainer.max_step=3"], "'trainer.max_steps'"),
        (["--data.seed=oops"], "data.seed"),
        (["-c", "more.yaml"], "more.yaml: "),
    ],
)
@pytest.mark.parametrize("on", ["local", "slurm", "k8s"])
def test_a_wrong_key_or_value_is_refused_and_nothing_is_submitted(
    words: list[str],
    named: str,
    on: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more.yaml").write_text("modle: {}\n")
    recipe = str(RECIPES / "debug.yaml")
    assert code_of(recipe, f"--on={on}", *words, f"--run_dir={tmp_path}/run") == 2
    said = capsys.readouterr()
    assert said.err.startswith("mmfusion launch: error: ")
    assert named in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["more.yaml"]


def test_a_recipe_whose_classes_are_elsewhere_can_be_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {encoders: {image: {class_path: ours.in_the_image.Encoder}}}\n")
    words = (str(recipe), "--on=slurm", f"--run_dir={tmp_path}/run")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_of(*words) == 2
    assert "ours.in_the_image" in capsys.readouterr().err
    assert code_of(*words, "--check=false") == 1
    assert "there is no sbatch" in capsys.readouterr().err, "it gets as far as that"
    assert code_of(*words, "--dry_run") == 0, "only shows it"
