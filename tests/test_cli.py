"""The command line: what it says about mistakes, and what it does not import."""

import ast
import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.fabric.plugins.environments import SLURMEnvironment

from mmfusion.cli import ON_CPUS, TOOLS, main, usage
from mmfusion.data.datamodule import MultimodalData
from mmfusion.models.llms.hf_causal_lm import HFCausalLM
from mmfusion.training.command import RecipeCommand
from mmfusion.training.rebuild import from_recipe, load_module
from tests.training.tiny import write_recipe

CONVERTER = {"class_path": "tests.training.tiny.TinyConverter"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def recipe(home):
    return write_recipe(home)


def fails(capsys, *args):
    """The exit code and what was printed to stderr."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return stop.value.code, error


def test_help_lists_every_command_without_importing_torch():
    code = "import sys, mmfusion.cli as c; c.main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("fit", "validate", "test", "predict", *TOOLS):
        assert f"  {name}" in done.stdout
    assert done.stdout.strip() == usage()


@pytest.mark.parametrize(
    ("args", "part", "argument"),
    [
        (["--help"], MultimodalData, "max_bad_fraction"),
        (["--model.llm.help=mmfusion.models.llms.hf_causal_lm.HFCausalLM"], HFCausalLM, "dtype"),
    ],
)
def test_help_is_the_docstrings_of_the_parts(args, part, argument, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args])
    assert stop.value.code == 0
    shown = "".join(capsys.readouterr().out.split())  # lines are wrapped anew
    documented = inspect.getdoc(part)
    first = documented.partition(".\n")[0]
    (described,) = re.findall(rf"^    {argument}: (.+(?:\n {{8}}.+)*)$", documented, re.M)
    for sentence in (first, described):
        assert len(sentence.split()) > 4
        assert "".join(sentence.split()) in shown


@pytest.mark.parametrize(
    ("args", "hint"),
    [(["fitt"], "'fit'"), (["data"], "'data at-step'"), (["data", "biuld"], "'data build'")],
)
def test_an_unknown_command_gets_a_suggestion(args, hint, capsys):
    code, error = fails(capsys, *args)
    assert code == 2
    assert "there is no command" in error
    assert hint in error


@pytest.mark.parametrize(
    ("key", "value", "named", "hint"),
    [
        ("trainr__max_steps", 3, "trainr.max_steps", "trainer.max_steps"),
        ("run_dirr", "x", "run_dirr", "run_dir"),
        ("model__tunin", {}, "model.tunin", "model.tuning"),
        ("model__tunin__llm", "x", "tunin.llm", "model.tuning"),
        ("packs_per_step", 2, "packs_per_step", "data.packs_per_step"),
        ("model__llm__init_args__paht", "x", "paht", "path"),
        ("data__sources__train__wieght", 2, "wieght", "weight"),
        ("model__tuning__llm", {"class_path": "mmfusion.tuning.Lora"}, "Lora", "LoRA"),
    ],
)
def test_a_wrong_key_in_a_recipe_is_named_with_a_suggestion(home, key, value, named, hint, capsys):
    code, error = fails(capsys, "fit", "-c", write_recipe(home, **{key: value}))
    assert code == 2
    assert f"'{named}'" in error or f".{named}" in error
    assert f"Did you mean '{hint}'?" in error


def test_a_shortened_option_is_not_guessed(recipe, capsys):
    code, error = fails(capsys, "fit", "-c", recipe, "--trainer.max_step=3")
    assert code == 2
    assert "Did you mean 'trainer.max_steps'?" in error


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--data.pack_tokens=many"], "data.pack_tokens"),
        (["--resume=must", "--run_dir=nowhere"], "--resume must"),
        (["--resume=nowhere.ckpt"], "no such file"),
        (["--model.init_from=nowhere"], "model.init_from nowhere: no such file"),
        (["--model.llm.init_args.path=/nowhere"], "/nowhere"),
        (["--data.sources.train.shards=nowhere/*.tar"], "nowhere"),
        (["--checkpoint.keep_last=1"], "keep_last"),
        (["--trainer.max_steps=-1"], "trainer.max_steps"),
        (["--trainer.precision=bf16-true"], "use bf16-mixed"),
        (["--trainer.min_steps=100"], "trainer.min_steps is 100"),
        (["--trainer.limit_train_batches=1"], "trainer.limit_train_batches is 1"),
        (["--trainer.overfit_batches=2"], "trainer.overfit_batches is 2"),
        (["--trainer.fast_dev_run=true"], "trainer.fast_dev_run is True"),
    ],
)
def test_a_mistake_is_one_message(recipe, args, said, tmp_path, capsys):
    code, error = fails(capsys, "fit", "-c", recipe, f"--run_dir={tmp_path}/run", *args)
    assert code in (1, 2)
    assert said in error


def test_of_a_key_that_may_be_null_only_the_mistake_is_told(recipe, capsys):
    """The parser's own words are of all kinds the value might have been, and of all of it."""
    stable = "mmfusion.models.generators.stable_diffusion.StableDiffusion"
    generator = {"class_path": stable, "init_args": {"path": "/nowhere"}}
    for command in ("fit", "describe"):
        args = (command, "-c", recipe, f"--model.generators={json.dumps({'image': generator})}")
        _, error = fails(capsys, *args)
        assert "no folder /nowhere (from path: /nowhere); give a folder or a hub id" in error
        assert "Union" not in error
        assert "NoneType" not in error
        assert len(error.splitlines()) <= 3


def test_missing_shards_are_told_before_a_run_is_made(recipe, tmp_path, capsys):
    for key in ("sources", "val_sources"):
        source = {"none": {"shards": "nowhere/*.tar", "converter": CONVERTER}}
        option = f"--data.{key}={json.dumps(source)}"
        assert "nowhere" in fails(capsys, "fit", "-c", recipe, f"--run_dir={tmp_path}/r", option)[1]
    assert not (tmp_path / "r").exists()


def test_a_recipe_that_is_not_there_or_not_yaml(tmp_path, capsys):
    assert "nowhere.yaml" in fails(capsys, "fit", "-c", "nowhere.yaml")[1]
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2")
    assert "line 2" in fails(capsys, "fit", "-c", tmp_path / "bad.yaml")[1]


def test_of_several_recipes_the_wrong_one_is_named(recipe, tmp_path, capsys):
    for name, content in {"bad": b"a: [1\nb: 2", "binary": b"\xff\0", "list": b"- 1"}.items():
        (tmp_path / f"{name}.yaml").write_bytes(content)
        error = fails(capsys, "fit", "-c", recipe, "-c", tmp_path / f"{name}.yaml")[1]
        assert f"error: {tmp_path}/{name}.yaml: " in error


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_nothing_to_evaluate_on_is_an_error(home, command, tmp_path, capsys):
    recipe = write_recipe(home, run_dir=str(tmp_path / "run"))
    assert "data.val_sources is empty" in fails(capsys, command, "-c", recipe)[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_run_that_is_not_there_is_not_evaluated_unless_asked(home, command, tmp_path, capsys):
    val = {"val": {"shards": f"{home}/val-*.tar", "converter": CONVERTER}}
    recipe = write_recipe(home, data__val_sources=val)
    options = [command, "-c", recipe, f"--run_dir={tmp_path}/typo"]
    assert "typo has no checkpoint" in fails(capsys, *options)[1]
    main([*map(str, options), "--resume=none"])


@pytest.mark.slow
def test_a_run_directory_stands_for_its_recipe(home, tmp_path, monkeypatch, capsys):
    """And its folder may be named by a variable."""
    monkeypatch.setenv("RUNS_OF_TEST", str(tmp_path))
    changes = {"trainer__max_steps": 2, "model__schedule": {"warmup_steps": 0}}
    recipe = write_recipe(home, run_dir="$RUNS_OF_TEST/run", **changes)
    main(["fit", "-c", str(recipe)])
    assert (tmp_path / "run" / "config.yaml").is_file()
    main(["fit", "-c", f"{tmp_path}/run"])
    assert "going on from" in capsys.readouterr().err
    main(["fit", f"--config={tmp_path}/run"])
    assert "going on from" in capsys.readouterr().err
    assert "is not a run directory" in fails(capsys, "fit", "-c", tmp_path)[1]
    (tmp_path / "run").rename(tmp_path / "moved")
    main(["fit", "-c", f"{tmp_path}/moved"])
    assert f"{tmp_path}/moved: going on from" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    unset = ["fit", "-c", tmp_path / "moved", "--run_dir=$RUNS_NO/x"]
    assert "'$RUNS_NO/x' names an environment variable that is not set" in fails(capsys, *unset)[1]


def test_shards_that_are_missing_are_named_by_their_key(home, tmp_path, capsys):
    recipe = write_recipe(home, run_dir=str(tmp_path / "run"))
    error = fails(capsys, "fit", "-c", recipe, "--data.sources.words.shards=none-*.tar")[1]
    assert "data.sources.words.shards: no shard 'none-*.tar'" in error


def test_what_the_user_says_of_threads_and_kernels_stays():
    code = "from mmfusion.cli import main; import os; main(['--version']); print(dict(os.environ))"
    for given, spins in (
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, None),
    ):
        clean = {k: v for k, v in os.environ.items() if k not in {*ON_CPUS, "OMP_WAIT_POLICY"}}
        program = [sys.executable, "-c", code]
        done = subprocess.run(program, env=clean | given, capture_output=True, text=True)
        found = ast.literal_eval(done.stdout.splitlines()[-1])
        assert found.get("GOMP_SPINCOUNT") == spins
        assert found["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "16384"


def test_without_a_recipe_it_is_asked_for(capsys):
    assert "-c RECIPE" in fails(capsys, "fit", "--trainer.max_steps=3")[1]
    assert "-c RECIPE" not in fails(capsys, "data", "build")[1]


def test_traceback_is_shown_where_it_is_asked_for(recipe):
    with pytest.raises(FileNotFoundError):
        main(["fit", "--traceback", "-c", str(recipe), "--resume=must"])


@pytest.mark.parametrize(
    ("typed", "called"),
    [
        ([], (None, False, False)),
        (["--small"], (None, True, False)),
        (["--with-baselines", "--run-dir", "x"], ("x", False, True)),
        (["--run_dir=x", "--small", "true"], ("x", True, False)),
    ],
)
def test_options_of_a_tool_reach_it(monkeypatch, typed, called):
    calls = []

    def quickstart(
        run_dir: str | None = None, small: bool = False, with_baselines: bool = False
    ) -> None:
        calls.append((run_dir, small, with_baselines))

    monkeypatch.setattr("mmfusion.tools.quickstart.main.quickstart", quickstart)
    main(["quickstart", *typed])
    assert calls == [called]


def test_print_config_can_be_run_again(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(recipe), "--data.seed=5", "--print_config"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text)
    module, data = from_recipe(str(tmp_path / "printed.yaml"))
    assert yaml.safe_load(text)["data"]["seed"] == data.seed == 5
    assert module.seed == 0


class OnlyMade(RecipeCommand):
    """Makes the trainer and does not train."""

    def fit(self):
        pass


def test_slurm_does_not_requeue_by_itself(recipe, monkeypatch):
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    made = OnlyMade("fit", ["-c", str(recipe), "--trainer.strategy=ddp"])
    environment = made.trainer.strategy.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue


def test_from_recipe_reads_no_weights_and_no_shards(recipe):
    module, data = from_recipe(str(recipe), ["--data.sources.train.shards=nowhere/*.tar"])
    assert module.model.llm.model is None
    assert list(data.sources) == ["train", "words"]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model__tuning__llm__init_args__lr", -1.0, "lr is -1.0"),
        ("model__tuning__llm__init_args__lr", math.nan, "lr is nan"),
        ("model__tuning__input_projectors__init_args__weight_decay", -0.1, "weight_decay is -0.1"),
        ("model__schedule__final_ratio", 2.0, "final_ratio is 2.0"),
        ("data__val_limit", -1, "val_limit must be at least 1"),
        ("data__num_workers", -1, "num_workers is -1"),
        ("data__max_bad_fraction", 2.0, "max_bad_fraction is 2.0"),
        ("data__pack_tokens", 0, "pack_tokens must be at least 1"),
        ("checkpoint__every_n_steps", 0, "every_n_steps is 0"),
        ("checkpoint__keep_every_n_steps", 0, "keep_every_n_steps is 0"),
        ("validation__generate_samples", -1, "generate_samples is -1"),
        ("val_every_n_steps", -1, "val_every_n_steps"),
        ("timeout_minutes", 0.0, "timeout_minutes"),
        ("trainer__devices", -3, "`devices`"),
        ("trainer__strategy", "abc", "abc"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(home, key, value, named, capsys):
    code, error = fails(capsys, "fit", "-c", write_recipe(home, **{key: value}))
    assert code in (1, 2)
    assert named in error
    assert "Traceback" not in error


def test_from_recipe_raises_for_a_wrong_override(recipe):
    with pytest.raises(ValueError, match="pack_tokens"):
        from_recipe(str(recipe), ["--data.pack_token=5"])


def test_load_module_refuses_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run directory"):
        load_module(tmp_path)
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "config.yaml").touch()
    with pytest.raises(FileNotFoundError, match="/stage is one"):
        load_module(tmp_path)


@pytest.mark.slow
def test_a_reader_that_goes_ends_a_tool_without_a_word(recipe):
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "mmfusion", "data", "at-step", str(recipe), "0", "--as_json"]
    root = Path(__file__).parents[1]
    done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=root)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_keys_of_a_recipe_are_overrides_of_the_tools_that_take_them() -> None:
    from mmfusion.cli import _spelled_out

    def tool(recipe: str, overrides: list[str] | None = None) -> None: ...

    def other(recipe: str) -> None: ...

    line = ["a.yaml", "--data.my-key=a-b"]
    assert _spelled_out(tool, line) == ["a.yaml", "--overrides+=--data.my-key=a-b"]
    assert _spelled_out(other, line) == line


def test_tools_take_recipes_as_fit_does() -> None:
    from mmfusion.cli import _spelled_out, _with_recipes

    def tool(
        recipe: str,
        step: int,
        fast: bool = False,
        out: str = "",
        overrides: list[str] | None = None,
    ) -> None: ...

    def other(recipe: str, config: str = "") -> None: ...

    def spelled(*line: str) -> list[str]:
        return _with_recipes(tool, _spelled_out(tool, line))

    more = "--overrides+=--config=b"
    assert spelled("a", "1", "-c", "b") == ["a", "1", more]
    assert spelled("-c", "a", "-c", "b", "1") == ["a", more, "1"]
    assert spelled("--out", "f", "--fast", "--config=a", "1", "--data.x=1", "--config", "b") == [
        "a", "--out", "f", "--fast=true", "1", "--overrides+=--data.x=1", more,
    ]  # fmt: skip
    assert spelled("--out=f", "a", "1") == ["--out=f", "a", "1"]
    assert spelled("1", "-c") == ["", "1"]
    assert _with_recipes(other, ["a", "--config", "b"]) == ["a", "--config", "b"]


def test_a_recipe_of_two_files_is_given_to_tools(recipe, home, capsys):
    (home / "more.yaml").write_text("data: {packs_per_step: 3}\n")
    main(["data", "at-step", "-c", str(recipe), "-c", str(home / "more.yaml"), "1"])
    assert "pack 5 " in capsys.readouterr().out
    main(["describe", str(recipe), "-c", str(home / "more.yaml")])
    assert "Parts" in capsys.readouterr().out


def test_flags_of_tools_need_no_value() -> None:
    from mmfusion.cli import _spelled_out

    def tool(run_dir: str | None = None, with_baselines: bool = False) -> None: ...

    line = ["--with-baselines", "--run-dir", "a-b"]
    assert _spelled_out(tool, line) == ["--with_baselines=true", "--run_dir", "a-b"]
    assert _spelled_out(tool, ["--with_baselines", "false"]) == ["--with_baselines", "false"]
    assert _spelled_out(tool, ["--unknown-x", "--run-dir=a-b"]) == ["--unknown-x", "--run_dir=a-b"]
