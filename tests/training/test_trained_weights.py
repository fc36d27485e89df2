"""What a run takes from an earlier stage or a checkpoint of its own, and what it refuses."""

import pytest
import torch

from mmfusion.cli import main
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.rebuild import from_recipe, load_module
from mmfusion.training.resume import find
from mmfusion.training.schedules import WarmupDecay
from tests.models.tiny import save_llm
from tests.training.tiny import fit, refused, write_recipe


def policy(name, **options):
    return {"class_path": f"mmfusion.tuning.{name}", "init_args": options}


PROJECTORS = {"input_projectors": policy("Full", lr=1e-2)}
LORA = {"llm": policy("LoRA", lr=1e-2, r=2)}
TINY = {"class_path": "tests.training.tiny.TinyConverter"}
NO_WARMUP = {"warmup_steps": 0}


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
    assert group["lr"] == pytest.approx(5e-3 * WarmupDecay(warmup_steps=2).factor(6, 6))
    assert saved["lr_schedulers"][0]["base_lrs"] == [5e-3]


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


@pytest.mark.slow
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


def test_a_checkpoint_of_another_tuning_is_refused(home):
    """Of this recipe, that is; as ``init_from`` it may have less."""

    def module(tuning):
        made, _ = from_recipe(str(write_recipe(home, model__tuning=tuning)))
        made.configure_model()
        return made

    less, more = module(PROJECTORS), module({**PROJECTORS, **LORA})
    checkpoint = {"state_dict": less.state_dict()}
    less.on_save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="no weights for 28 tensors that train here"):
        more.on_load_checkpoint(checkpoint)
    checkpoint = {"state_dict": more.state_dict()}
    more.on_save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="28 tensors of the checkpoint have no place here"):
        less.on_load_checkpoint(checkpoint)


def test_init_from_of_a_run_without_checkpoint_is_refused(home, capsys, tmp_path):
    recipe = write_recipe(home, model__init_from=str(tmp_path))
    error = refused(capsys, recipe, f"--run_dir={tmp_path}/run")
    assert "model.init_from" in error
    assert "no checkpoint" in error


def test_init_from_with_another_projector_is_refused(home, stage1, capsys, tmp_path):
    other = {"image": {"class_path": "mmfusion.models.projectors.mlp.MLP"}}
    recipe = write_recipe(home, model__init_from=str(stage1.path), model__input_projectors=other)
    assert "none of the 2 weights" in refused(capsys, recipe, f"--run_dir={tmp_path}/run")


def test_a_projector_of_another_activation_is_refused(home, capsys, tmp_path):
    def mlp(activation):
        options = {"activation": activation, "hidden_dim": 8}
        return {"image": {"class_path": "mmfusion.models.projectors.mlp.MLP", "init_args": options}}

    first = fit(
        write_recipe(home, model__tuning=PROJECTORS, model__input_projectors=mlp("gelu")),
        f"--run_dir={tmp_path}/first",
    )
    other = write_recipe(
        home,
        model__tuning=PROJECTORS,
        model__init_from=str(first.path),
        model__input_projectors=mlp("relu"),
    )
    error = refused(capsys, other, f"--run_dir={tmp_path}/second")
    assert "input_projectors.image was trained with activation 'gelu', here it has 'relu'" in error
    assert "init_drop: [input_projectors.image]" in error


@pytest.mark.slow
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


@pytest.mark.slow
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
