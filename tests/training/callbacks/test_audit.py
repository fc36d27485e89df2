"""What the audit says while a run goes on."""

import pytest

from mmfusion.cli import main
from mmfusion.data.writer import ShardWriter
from mmfusion.training.callbacks import audit
from tests.training.tiny import fit, write_recipe

ENCODER = "tests.models.tiny.TinyEncoder"


def test_a_modality_that_trains_without_a_sample_is_named(tmp_path, capsys):
    projector = {"class_path": "mmfusion.models.projectors.linear.Linear"}
    recipe = write_recipe(
        tmp_path,
        trainer__max_steps=4,
        model__encoders={
            "image": {"class_path": ENCODER},
            "audio": {"class_path": ENCODER, "init_args": {"modality": "audio"}},
        },
        model__input_projectors={"image": projector, "audio": projector},
    )
    fit(recipe)
    assert "last 4 steps held media of audio, though" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fast", "precision", "warned"),
    [(False, "bf16-mixed", True), (False, "32-true", False), (True, "bf16-mixed", False)],
)
def test_half_precision_is_named_where_the_cpu_has_no_instructions_for_it(
    tmp_path, capsys, monkeypatch, fast, precision, warned
):
    monkeypatch.setattr(audit, "computes_bfloat16", lambda device: fast)
    fit(write_recipe(tmp_path, trainer__max_steps=1, trainer__precision=precision,
                     model__schedule={"warmup_steps": 0}))  # fmt: skip
    said = "trainer.precision: half precision, for which this CPU has no instructions"
    assert (said in capsys.readouterr().err) == warned


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_half_precision_is_named_where_nothing_trains_as_well(
    tmp_path, capsys, monkeypatch, command
):
    monkeypatch.setattr(audit, "computes_bfloat16", lambda device: False)
    write_recipe(tmp_path)  # the shards
    source = {
        "shards": str(tmp_path / "val-*.tar"),
        "converter": {"class_path": "tests.training.tiny.TinyConverter"},
    }
    recipe = write_recipe(
        tmp_path, trainer__precision="bf16-mixed", data__val_sources={"val": source}
    )
    main([command, "-c", str(recipe), "--resume=none", "--wandb=off"])
    assert capsys.readouterr().err.count("trainer.precision: half precision, for which") == 1


@pytest.mark.parametrize("steps", [1, 2])
def test_media_that_first_come_in_the_last_step_are_seen(tmp_path, capsys, steps):
    """A run of one step, and one that goes on for one more."""
    changes = {"model__schedule": {"warmup_steps": 0}, "data__sources": pictures_only(tmp_path)}
    recipe = write_recipe(tmp_path, trainer__max_steps=1, **changes)
    fit(recipe)
    if steps == 2:
        fit(recipe, "--trainer.max_steps=2", "--allow_recipe_change")
    assert "held media" not in capsys.readouterr().err


def pictures_only(folder):
    with ShardWriter(str(folder / "pictures-%06d.tar")) as writer:
        for i in range(40):
            writer.write(f"k{i}", {"image": bytes([i, 1]), "txt": b"w1 w2"})
    converter = {"class_path": "tests.training.tiny.TinyConverter"}
    return {"pictures": {"shards": str(folder / "pictures-*.tar"), "converter": converter}}
