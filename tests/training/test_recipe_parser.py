from __future__ import annotations

from pathlib import Path

import pytest

from mmfusion.cli import main
from mmfusion.training.recipe_parser import (
    RecipeError,
    ignored_key,
    refuse_repeated_keys,
    with_suggestion,
)
from tests.training.tiny import write_recipe


def test_a_key_left_out_for_being_empty_is_found():
    given = {"other": 1, "model": {"class_path": "A", "init_args": {"x": None}}}
    parsed = {"model": {"class_path": "A", "init_args": {}}}
    assert ignored_key(given, parsed) == "model.init_args.x"
    assert ignored_key(given, given) is None


def test_arguments_of_a_class_that_another_recipe_replaced_do_not_count():
    given = {"class_path": "A", "init_args": {"x": None}}
    assert ignored_key(given, {"class_path": "B", "init_args": {"y": 1}}) is None


def test_the_whole_key_is_suggested():
    keys = {"pack_tokens": "data.pack_tokens", "data.pack_tokens": "data.pack_tokens"}
    assert with_suggestion("Option 'pack_tokenz' is wrong", keys).endswith("'data.pack_tokens'?")
    assert with_suggestion("Option 'zzz' is wrong", keys) == "Option 'zzz' is wrong"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", r"'a' comes twice, in lines 1 and 3"),
        ("a:\n- b: {c: 1,\n    'c': 2}\n", r"'a\.0\.b\.c' comes twice, in lines 2 and 3"),
        ("a: &x {b: 1, b: 2}\nc: *x\n", r"'a\.b' comes twice, in lines 1 and 1"),
    ],
)
def test_a_key_that_comes_twice_is_refused_with_both_lines(text: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        refuse_repeated_keys(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: {b: 1}\nc: {b: 1}\n",
        "a: &x {b: 1}\nc: {<<: *x, b: 2}\n",
        "a: &x [*x]\n",
        "a: [\n",
        "",
        "1: a\n'1': b\n",
        "? [a]\n: 1\n",
    ],
)
def test_keys_that_differ_or_are_merged_may_stand(text: str) -> None:
    refuse_repeated_keys(text)


def test_aliases_of_aliases_are_read_once() -> None:
    lines = ["x0: &x0 {a: 1}", *(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]" for i in range(1, 60))]
    refuse_repeated_keys("\n".join([*lines, "? *x59\n: {a: 1}"]))


def test_a_second_section_of_a_recipe_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "twice.yaml"
    recipe.write_text("trainer: {max_steps: 1}\nmodel: {}\ntrainer: {max_steps: 2}\n")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(recipe)])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "twice.yaml: the key 'trainer' comes twice, in lines 1 and 3" in told
    assert "Traceback" not in told


COMMAND = {"class_path": "os.system", "init_args": {"command": "touch ran"}}
HOOK = {
    "class_path": "lightning.pytorch.callbacks.LambdaCallback",
    "init_args": {"on_fit_start": COMMAND},
}


@pytest.mark.parametrize("command", ["fit", "validate", "describe", "data at-step"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model__input_projectors", {"image": COMMAND}),
        ("model__optimizer", COMMAND),
        ("trainer__callbacks", [HOOK]),
    ],
)
def test_a_function_of_a_stranger_is_not_called(
    tmp_path, tmp_path_factory, monkeypatch, capsys, command, key, value
):
    home = tmp_path_factory.getbasetemp() / "functions"
    recipe = str(write_recipe(home, **{key: value}))
    monkeypatch.chdir(tmp_path)
    arguments = ["-c", recipe] if command in ("fit", "validate") else [recipe]
    step = ["1"] if command == "data at-step" else []
    with pytest.raises(SystemExit):
        main([*command.split(), *arguments, *step])
    assert "class_path is os.system, which is no class" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
