"""Stages, what a checkpoint keeps, and what is refused, through the command."""

import csv
import json
import shutil
import time

import lightning as L
import pytest
import torch

from mmfusion.cli import main
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.rebuild import from_recipe, load_module
from mmfusion.training.resume import by_step, find
from mmfusion.training.schedules import WarmupCosine
from tests.models.tiny import save_llm
from tests.training.tiny import HERE, fit, losses, write_recipe

PROJECTORS = {"input_projectors": {"class_path": "mmfusion.tuning.Full", "init_args": {"lr": 1e-2}}}
TINY = {"class_path": "tests.training.tiny.TinyConverter"}
NO_WARMUP = {"warmup_steps": 0}
LORA = {"llm": {"class_path": "mmfusion.tuning.LoRA", "init_args": {"r": 2, "lr": 1e-2}}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def stage1(home):
    recipe = write_recipe(home, trainer__max_steps=4, model__tuning=PROJECTORS)
    return fit(recipe, f"--run_dir={home}/stage1")


@pytest.fixture(scope="module")
def stage2(home, stage1):
    recipe = write_recipe(
        home, trainer__max_steps=4, model__tuning=LORA, model__init_from=str(stage1.path)
    )
    return fit(recipe, f"--run_dir={home}/stage2")


def state(run):
    return read_checkpoint(find(run.path))["state_dict"]


def projector_of(state):
    return {name: tensor for name, tensor in state.items() if "input_projectors" in name}


def refused(capsys, recipe, *options):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(recipe), *options])
    assert stop.value.code == 1
    return capsys.readouterr().err


def test_a_checkpoint_of_stage_1_holds_the_projector_and_nothing_else(stage1):
    assert set(state(stage1)) == {
        "model.input_projectors.image.linear.weight",
        "model.input_projectors.image.linear.bias",
    }


def test_stage_2_keeps_the_projector_of_stage_1_though_it_is_frozen(stage1, stage2):
    earlier, later = state(stage1), state(stage2)
    kept = projector_of(later)
    assert kept.keys() == earlier.keys()
    assert all(torch.equal(kept[name], earlier[name]) for name in earlier)
    others = set(later) - set(kept)
    assert others
    assert all("lora_" in name for name in others)


def test_a_resumed_stage_2_needs_no_stage_1_and_takes_the_recipes_rates(home, stage1, stage2):
    tuning = {"llm": {**LORA["llm"], "init_args": {"r": 2, "lr": 5e-3, "weight_decay": 0.1}}}
    recipe = write_recipe(
        home, trainer__max_steps=6, model__tuning=tuning, model__init_from=str(stage1.path)
    )
    earlier = state(stage1)
    stage1.path.rename(home / "away")
    try:
        run = fit(recipe, f"--run_dir={stage2.path}", "--allow_recipe_change")
    finally:
        (home / "away").rename(stage1.path)
    assert find(run.path).name == "step-00000006.ckpt"
    kept = projector_of(state(run))
    assert all(torch.equal(kept[name], earlier[name]) for name in earlier)
    saved = read_checkpoint(find(run.path))
    group = saved["optimizer_states"][0]["param_groups"][0]
    assert (group["initial_lr"], group["weight_decay"]) == (5e-3, 0.1)
    assert group["lr"] == pytest.approx(5e-3 * WarmupCosine(warmup_steps=2).factor(6, 6))
    assert saved["lr_schedulers"][0]["base_lrs"] == [5e-3]


def test_a_stage_that_would_lose_trained_weights_is_refused(home, stage2, capsys, tmp_path):
    recipe = write_recipe(
        home,
        trainer__max_steps=2,
        model__tuning=PROJECTORS,
        model__init_from=str(stage2.path),
    )
    options = [f"--run_dir={tmp_path}/run", "--resume=none"]
    error = refused(capsys, recipe, *options)
    assert "28 trained tensors" in error
    assert "LoRA with train: false" in error
    error = refused(capsys, recipe, *options, "--model.init_drop=[lm]")
    assert "names 'lm', but" in error
    run = fit(recipe, *options, "--model.init_drop=[llm]")
    assert state(run).keys() == projector_of(state(run)).keys()


def test_an_optimizer_in_another_order_is_refused(home):
    def module(tuning):
        made, _ = from_recipe(str(write_recipe(home, model__tuning=tuning)))
        made.configure_model()
        return made

    first, other = module({**PROJECTORS, **LORA}), module({**LORA, **PROJECTORS})
    checkpoint = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(checkpoint)
    first.on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"input_projectors\..* there, model\.llm.* here"):
        other.on_load_checkpoint(checkpoint)


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
    assert state(compiled).keys() == state(plain).keys()


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


def test_a_run_is_loaded_from_its_folder_alone(stage1, stage2, home):
    (stage1.path).rename(home / "elsewhere")
    try:
        module = load_module(stage2.path)
    finally:
        (home / "elsewhere").rename(stage1.path)
    loaded = module.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state(stage2).items())
    with pytest.raises(FileNotFoundError):
        load_module(stage2.path, step=999)


def test_init_from_of_a_run_without_checkpoint_is_refused(home, capsys, tmp_path):
    recipe = write_recipe(home, model__init_from=str(tmp_path))
    error = refused(capsys, recipe, f"--run_dir={tmp_path}/run")
    assert "model.init_from" in error
    assert "no checkpoint" in error


def test_init_from_with_another_projector_is_refused(home, stage1, capsys, tmp_path):
    other = {"image": {"class_path": "mmfusion.models.projectors.mlp.MLP"}}
    recipe = write_recipe(home, model__init_from=str(stage1.path), model__input_projectors=other)
    assert "none of the 2 weights" in refused(capsys, recipe, f"--run_dir={tmp_path}/run")


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens_trained_with_the_whole_table_are_taken(tmp_path, tied):
    write_recipe(tmp_path)
    save_llm(tmp_path / "llm", tie_word_embeddings=tied)
    llm = llm_with(tmp_path, "<a>", "<b>")
    recipe = write_recipe(
        tmp_path,
        trainer__max_steps=4,
        model__llm=llm,
        model__tuning={**PROJECTORS, "llm": policy("Full", lr=1e-1)},
    )
    first = fit(recipe)
    for name, policies in {
        "trains": [policy("NewTokens", lr=0.0)],
        "frozen": [policy("NewTokens", lr=0.0, train=False)],
        "lora": [policy("LoRA", lr=0.0, r=2), policy("NewTokens", lr=0.0)],
    }.items():
        second = write_recipe(
            tmp_path,
            trainer__max_steps=1,
            model__schedule=NO_WARMUP,
            model__llm=llm,
            model__init_from=str(first.path),
            model__tuning={"input_projectors": policy("Full", lr=0.0), "llm": policies},
        )
        run = fit(second, f"--run_dir={tmp_path}/{name}")
        torch.testing.assert_close(new_rows(run), new_rows(first))
    assert len(new_rows(first).unique()) > 4


def policy(name, **options):
    return {"class_path": f"mmfusion.tuning.{name}", "init_args": options}


def llm_with(folder, *tokens):
    options = {"path": str(folder / "llm"), "new_tokens": [*tokens]}
    return {
        "class_path": "mmfusion.models.llms.hf_causal_lm.HFCausalLM",
        "init_args": options,
    }


def new_rows(run):
    """Of the embeddings and of the head, as the model uses them."""
    llm = load_module(run.path).model.llm
    ids = torch.tensor([llm.new_token_ids])
    with torch.no_grad():
        head = llm.logits(torch.eye(llm.hidden_dim))[:, ids[0]].T
        return torch.cat([llm.embed(ids)[0], head])


@pytest.mark.parametrize(
    ("lora", "tokens", "said"),
    [
        ({"r": 2}, ["<a>", "<b>"], "adapters were trained with another scale"),
        ({"r": 2, "alpha": 32.0, "use_rslora": True}, ["<a>", "<b>"], "another scale"),
        ({"r": 2, "alpha": 32.0}, ["<b>", "<a>"], "same order"),
        ({"r": 2, "alpha": 32.0}, ["<x>", "<y>"], "same tokens"),
    ],
)
def test_weights_that_would_mean_something_else_are_refused(
    tmp_path_factory, capsys, lora, tokens, said
):
    folder = tmp_path_factory.getbasetemp() / "meaning"
    before = {"r": 2, "alpha": 32.0}

    def recipe(tokens, lora, **more):
        policies = [policy("LoRA", lr=1e-2, **lora), policy("NewTokens", lr=1e-2)]
        return write_recipe(
            folder,
            trainer__max_steps=1,
            model__schedule=NO_WARMUP,
            model__llm=llm_with(folder, *tokens),
            model__tuning={**PROJECTORS, "llm": policies},
            data__val_sources={"val": {"shards": f"{folder}/val-*.tar", "converter": TINY}},
            **more,
        )

    if not (folder / "run").exists():
        fit(recipe(["<a>", "<b>"], before))
        capsys.readouterr()
    start = {"model__init_from": str(folder / "run"), "run_dir": str(folder / "next")}
    options = ["--resume=none", "--allow_recipe_change"]
    assert said in refused(capsys, recipe(tokens, lora, **start), *options)
    fit(recipe(tokens, lora, **start), *options, "--model.init_drop=[llm]")
    run = recipe(tokens, lora)
    with pytest.raises(SystemExit):
        main(["validate", "-c", str(run)])
    assert said in capsys.readouterr().err
    elsewhere = recipe(tokens, lora, run_dir=str(folder / "elsewhere"))
    assert said in refused(capsys, elsewhere, f"--resume={find(folder / 'run')}")


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
    error = refused(capsys, recipe, f"--run_dir={tmp_path}/run")
    assert "gradients of optimizer step 1 are not finite" in error
    assert "train00" in error or "words00" in error
    assert [p.name for p in by_step(tmp_path / "run" / "checkpoints")] == ["step-00000001.ckpt"]


def test_validation_counts_optimizer_steps_and_the_other_commands_use_the_run(
    home, tmp_path, capsys
):
    converter = {"class_path": f"{HERE}.TinyConverter"}
    recipe = write_recipe(
        home,
        trainer__max_steps=4,
        val_every_n_steps=2,
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
    main(["test", *options])
    capsys.readouterr()
    main(["predict", *options])
    written = [json.loads(line) for line in (run.path / "predictions.jsonl").open()]
    assert len(written) == 12
    total = sum(row["next_token"] for row in written)
    tokens = sum(row["next_token_tokens"] for row in written)
    assert total / tokens == pytest.approx(float(validated[3]), rel=1e-5)
