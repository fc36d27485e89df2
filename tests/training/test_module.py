"""Training steps, evaluation and what is refused before them, through the command."""

import csv
import json
import shutil
import time

import lightning as L
import pytest
import torch

from mmfusion.cli import main
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.resume import by_step, find
from tests.training.tiny import HERE, fit, losses, refused, write_recipe

PROJECTORS = {"input_projectors": {"class_path": "mmfusion.tuning.Full", "init_args": {"lr": 1e-2}}}
TINY = {"class_path": "tests.training.tiny.TinyConverter"}
NO_WARMUP = {"warmup_steps": 0}
LORA = {"llm": {"class_path": "mmfusion.tuning.LoRA", "init_args": {"r": 2, "lr": 1e-2}}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_a_run_with_compiled_layers_learns_what_it_learns_without(home, tmp_path):
    def run(compiled):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        tuning = {**PROJECTORS, **LORA}
        recipe = write_recipe(
            home, trainer__max_steps=3, model__tuning=tuning, model__compile=compiled
        )
        done = fit(recipe, f"--run_dir={tmp_path}/{compiled}")
        return done, torch._dynamo.utils.counters["stats"]["unique_graphs"]

    (plain, none), (compiled, graphs) = run(False), run(True)
    assert none == 0
    assert graphs >= 1
    expected = {step: float(loss) for step, loss in losses(plain).items()}
    assert len(expected) == 3
    assert {k: float(v) for k, v in losses(compiled).items()} == pytest.approx(expected, rel=1e-4)
    names = [read_checkpoint(find(r.path))["state_dict"].keys() for r in (plain, compiled)]
    assert names[0] == names[1]


def test_accumulation_that_is_not_the_datas_is_refused(home, capsys, tmp_path):
    options = [f"--run_dir={tmp_path}/run", "--trainer.accumulate_grad_batches=3"]
    error = refused(capsys, write_recipe(home), *options)
    assert "accumulate_grad_batches is 3" in error
    assert "give 2 micro-batches" in error
    assert "Loading weights" not in error, "it costs nothing"


def test_a_schedule_that_cannot_be_is_refused_before_weights_are_loaded(home, capsys, tmp_path):
    error = refused(
        capsys, write_recipe(home), f"--run_dir={tmp_path}/run", "--model.schedule.warmup_steps=99"
    )
    assert "warmup_steps is 99" in error
    assert "Loading weights" not in error


@pytest.mark.slow
def test_a_run_out_of_time_is_not_finished_and_goes_on(home, tmp_path, capsys):
    changes = {"trainer__max_steps": 8, "run_dir": str(tmp_path / "run")}
    slow = {"class_path": f"{__name__}.Slow"}
    recipe = write_recipe(home, trainer__callbacks=[slow], **changes)
    stops = []
    while len(stops) < 8:
        run = fit(recipe, "--trainer.max_time=00:00:00:01")
        if run.status()["state"] == "finished":
            break
        assert "max_time was reached at step" in capsys.readouterr().err
        status = run.status()
        reason = "trainer.max_time was reached"
        assert (status["state"], status["reason"]) == ("interrupted", reason)
        stops.append(status["step"])
    # The clock begins anew in each start: every start takes the run further.
    assert stops
    assert stops == sorted(set(stops))
    assert run.status()["state"] == "finished"
    assert sorted(losses(run)) == [*range(8)]
    assert losses(run) == losses(fit(write_recipe(home, **changes | {"run_dir": f"{tmp_path}/b"})))


class Weights(L.Callback):
    """The projector's weights after each step, and the step's targets."""

    seen: list[tuple[int, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        weight = module.model.input_projectors["image"].linear.weight
        self.seen.append((int(batch.step_counts["tokens"]), weight.detach().clone()))


@pytest.mark.slow
def test_a_step_without_targets_changes_no_weight_and_logs_no_loss(home, tmp_path):
    """The last steps of a finite run may have none: packs of lanes that are used up."""
    Weights.seen.clear()
    recipe = write_recipe(
        home,
        trainer__max_steps=400,
        trainer__callbacks=[{"class_path": f"{__name__}.Weights"}],
        model__schedule=NO_WARMUP,
        data__epochs=1,
        data__sources={"train": {"shards": f"{home}/train-*.tar", "converter": TINY}},
        data__lanes=40,
        data__packs_per_step=2,
        data__packs_per_micro_batch=2,
        run_dir=str(tmp_path / "run"),
    )
    run = fit(recipe)
    empty = [step for step, (targets, _) in enumerate(Weights.seen) if not targets]
    assert empty
    for step in range(1, len(Weights.seen)):
        same = torch.equal(Weights.seen[step][1], Weights.seen[step - 1][1])
        assert same == (step in empty)
    assert sorted(losses(run)) == [s for s in range(len(Weights.seen)) if s not in empty]


@pytest.mark.slow
def test_without_our_metrics_no_validation_is_made_twice(home, tmp_path):
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "csv")}}
    recipe = write_recipe(
        home,
        trainer__max_steps=4,
        trainer__logger=logger,
        val_every_n_steps=2,
        data__val_sources={"val": {"shards": f"{home}/val-*.tar", "converter": TINY}},
        run_dir=str(tmp_path / "run"),
    )
    fit(recipe)
    fit(recipe)
    found = []
    for file in sorted((tmp_path / "csv").rglob("metrics.csv")):
        rows = csv.DictReader(file.open())
        found += [int(row["step"]) for row in rows if row.get("val/loss")]
    assert found == [1, 3]


class Slow(L.Callback):
    def on_train_batch_end(self, *_):
        time.sleep(0.3)


AUDIT = [
    ({}, "", "nothing trains"),
    ({"llm": {"class_path": "mmfusion.tuning.Frozen"}}, "", "nothing trains"),
    (
        {
            "llm": {
                "class_path": "mmfusion.tuning.LoRA",
                "init_args": {"lr": 1, "targets": ["nope"]},
            }
        },
        "",
        "nope",
    ),
    (LORA, "", "2 random parameters neither train nor were loaded"),
    ({**PROJECTORS, "encoders.audio": PROJECTORS["input_projectors"]}, "", "encoders.audio"),
    (PROJECTORS, '--model.llm.init_args.new_tokens=["<IMG0>"]', "new tokens"),
]


@pytest.mark.parametrize(("tuning", "option", "said"), AUDIT)
def test_the_audit_refuses(home, tuning, option, said, capsys, tmp_path):
    recipe = write_recipe(home, model__tuning=tuning)
    options = [f"--run_dir={tmp_path}/run", *([option] if option else [])]
    assert said in refused(capsys, recipe, *options)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_a_part_that_trains_but_reaches_no_loss_is_refused(home, capsys, tmp_path):
    part = {"class_path": "mmfusion.models.projectors.learned_tokens.LearnedTokens"}
    encoder = {"encoders.image": PROJECTORS["input_projectors"]}
    recipe = write_recipe(
        home, model__tuning={**PROJECTORS, **encoder}, model__input_projectors={"image": part}
    )
    error = refused(capsys, recipe, f"--run_dir={tmp_path}/run")
    assert "reach no loss" in error
    assert "encoders.image" in error


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_step_that_is_not_finite_names_itself_and_its_samples(
    home, gradient_only, capsys, tmp_path
):
    broken = {
        "class_path": f"{HERE}.NotANumber",
        "init_args": {"from_step": 3, "gradient_only": gradient_only},
    }
    recipe = write_recipe(
        home, model__objectives={"next_token": broken}, checkpoint__every_n_steps=1
    )
    error = refused(capsys, recipe, f"--run_dir={tmp_path}/run", "--guard.not_finite=fail")
    assert "gradients of optimizer step 1 are not finite" in error
    assert "train00" in error or "words00" in error
    assert [p.name for p in by_step(tmp_path / "run" / "checkpoints")] == ["step-00000001.ckpt"]


@pytest.mark.slow
def test_validation_counts_optimizer_steps_and_the_other_commands_use_the_run(
    home, tmp_path, capsys
):
    converter = {"class_path": f"{HERE}.TinyConverter"}
    recipe = write_recipe(
        home,
        trainer__max_steps=4,
        val_every_n_steps=2,
        checkpoint__every_n_steps=2,
        data__val_sources={"val": {"shards": f"{home}/val-*.tar", "converter": converter}},
    )
    options = ["-c", str(recipe), f"--run_dir={tmp_path}/run"]
    run = fit(recipe, options[-1])
    with (run.path / "metrics.csv").open() as file:
        header = file.readline().strip().split(",")
        rows = [dict(zip(header, line.strip().split(","), strict=True)) for line in file]
    validated = {int(float(r["trainer/global_step"])): r["val/loss"] for r in rows if r["val/loss"]}
    assert sorted(validated) == [1, 3]
    assert len(losses(run)) == 4
    main(["validate", *options])
    main(["test", *options, f"--resume={run.path}/checkpoints/step-00000002.ckpt"])
    pages = {folder.name for folder in (run.path / "samples").iterdir()}
    assert pages >= {"val-00000002", "val-00000004", "validate-00000004", "test-00000002"}
    said = [(run.path / "samples" / f"{name}-00000004" / "samples.jsonl").read_text()
            for name in ("val", "validate")]  # fmt: skip
    assert said[0] == said[1]
    capsys.readouterr()
    main(["predict", *options])
    written = [json.loads(line) for line in (run.path / "predictions.jsonl").open()]
    assert len(written) == 12
    total = sum(row["next_token"] for row in written)
    tokens = sum(row["next_token_tokens"] for row in written)
    assert total / tokens == pytest.approx(float(validated[3]), rel=1e-5)
