"""What the audit says while a run goes on."""

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
    assert "first 4 steps held media of audio, though" in capsys.readouterr().err
