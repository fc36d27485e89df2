"""A recipe is described without any weight file, and the numbers are those of the built model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mmfusion import tuning
from mmfusion.cli import main
from mmfusion.models.generators.base import PARTS
from mmfusion.tools.describe import Description, description
from mmfusion.training.rebuild import from_recipe
from tests.training import pictures
from tests.training.tiny import write_recipe


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, torch.nn.Module]:
    """A recipe whose weights were loaded once, and are gone now."""
    folder = tmp_path_factory.mktemp("describe")
    recipe = str(write_recipe(folder))
    module, _ = from_recipe(recipe)
    module.configure_model()
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    for shard in folder.rglob("*.tar*"):
        shard.unlink()
    return recipe, module.model


@pytest.fixture(scope="module")
def found(built: tuple[str, torch.nn.Module]) -> Description:
    return description(built[0])


def test_parameters_are_those_of_the_built_model(
    built: tuple[str, torch.nn.Module], found: Description
) -> None:
    for row in found.parts:
        part = built[1].get_submodule(row.name)
        assert row.parameters == sum(p.numel() for p in part.parameters())
        assert row.trainable == sum(p.numel() for p in part.parameters() if p.requires_grad)
        tensors = [*part.parameters(), *part.buffers()]
        assert row.weights == sum(t.numel() * t.element_size() for t in tensors)
        assert row.optimizer == 8 * row.trainable
    names = {row.name: row.tuning for row in found.parts}
    assert names == {
        "encoders.image": "Frozen",
        "input_projectors.image": "Full 0.01",
        "llm": "LoRA 0.01",
    }


def test_media_rows_say_what_an_item_becomes(found: Description) -> None:
    (row,) = found.media
    assert (row.modality, row.features, row.tokens) == ("image", (4, 8), (4, 32))


def test_activations_follow_the_micro_batch(
    built: tuple[str, torch.nn.Module], found: Description
) -> None:
    assert found.tokens == 2 * 64
    larger = description(built[0], ["--data.pack_tokens=128"])
    assert larger.activations == 2 * found.activations > 0
    assert sum(found.memory.values()) > found.activations


def test_keys_of_the_recipe_are_taken_as_fit_takes_them(
    built: tuple[str, torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["describe", built[0], "--data.pack_tokens=128", "--data.packs_per_micro_batch=1"])
    assert "128 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["describe", built[0], "--data.pack_token=128"])
    assert "Did you mean 'data.pack_tokens'?" in capsys.readouterr().err


def test_a_run_directory_is_described_by_its_config(
    built: tuple[str, torch.nn.Module], found: Description, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"not a run directory: it has no config.yaml"):
        description(str(tmp_path))
    shutil.copy(built[0], tmp_path / "config.yaml")
    assert description(str(tmp_path)) == found


def test_the_command_prints_tables(
    built: tuple[str, torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["describe", built[0]])
    shown = capsys.readouterr().out
    for word in ("input_projectors.image", "TinyEncoder", "LoRA 0.01", "4 x 32", "activations"):
        assert word in shown
    (left_out,) = (line for line in shown.splitlines() if line.startswith("Not counted:"))
    for word in ("libraries", "kernels' caches", "loader processes", "activations of encoders"):
        assert word in left_out


def test_a_recipe_that_the_audit_refuses_says_so(
    built: tuple[str, torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(Path(built[0]).parent, model__tuning={"llm": {
        "class_path": "mmfusion.tuning.Frozen"}})  # fmt: skip
    assert "nothing trains" in description(str(recipe)).audit
    main(["describe", str(recipe)])
    assert "fit will refuse this recipe" in capsys.readouterr().out


def test_a_wrong_recipe_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, model__tunning={"llm": 1})
    with pytest.raises(SystemExit) as exit:
        main(["describe", str(recipe)])
    assert exit.value.code
    assert "tunning" in capsys.readouterr().err


def test_a_policy_that_matches_nothing_is_an_error(built: tuple[str, torch.nn.Module]) -> None:
    recipe = write_recipe(Path(built[0]).parent, model__tuning={"lm": {
        "class_path": "mmfusion.tuning.Frozen"}})  # fmt: skip
    with pytest.raises(tuning.TuningError, match="did you mean 'llm'"):
        description(str(recipe))


def test_generators_and_what_they_take_are_shown(tmp_path, capsys):
    path = str(pictures.recipe(pictures.prepare(tmp_path)))
    found = description(path)
    names = [part.name for part in found.parts]
    assert names == ["llm", "output_projectors.image", "generators.image"]
    assert found.parts[1].trainable == found.parts[1].parameters > 0
    assert found.made[0].conditioning == "12 x 32"
    main(["describe", path])
    out = capsys.readouterr().out
    assert "Media of answers" in out
    assert "StableDiffusion" in out


@pytest.mark.slow
def test_parts_that_only_a_validation_needs_are_shown(tmp_path):
    """``validation.media_samples``, also of a callback that takes its place."""
    home = pictures.prepare(tmp_path)
    align = {"next_token": pictures.NEXT_TOKEN, "align": pictures.objective("align")}
    path = pictures.recipe(home, model__objectives=align)
    words = {"class_path": "tests.training.tiny.TinyConverter"}
    sources = {"words": {"shards": f"{home}/words-*.tar", "converter": words}}
    callback = {
        "class_path": "mmfusion.training.callbacks.validation.Validation",
        "init_args": {"media_samples": 2},
    }
    validated = f"--data.val_sources={json.dumps(sources)}"
    made = "--validation.media_samples=2"
    sizes = [
        {part.name: part.parameters for part in description(str(path), options).parts}
        for options in (
            [],
            [made],  # without sources nothing is made
            [validated],
            [validated, made],
            [validated, f"--trainer.callbacks={json.dumps([callback])}"],
        )
    ]
    text, *others, whole, own = [size["generators.image"] for size in sizes]
    assert others == [text, text]
    module, _ = from_recipe(str(path))
    module.model.need("image", PARTS)
    module.configure_model()
    everything = module.model.generator("image").parameters()
    assert own == whole == sum(p.numel() for p in everything) > text > 0
