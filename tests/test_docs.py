"""The pages under ``docs/`` name what is there: commands and their options, classes, keys of
recipes, files, links.
"""

from __future__ import annotations

import inspect
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from mmfusion.cli import RECIPE_COMMANDS, TOOLS
from mmfusion.data.datamodule import MultimodalData
from mmfusion.training.callbacks.checkpointing import RunCheckpoint
from mmfusion.training.module import MultimodalModule

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
SECTIONS = {"data": MultimodalData, "model": MultimodalModule, "checkpoint": RunCheckpoint}


def found(pattern: str) -> list[tuple[str, str]]:
    """(page, match) of a pattern with one group, each once."""
    pairs = {
        (page.name, match) for page in PAGES for match in re.findall(pattern, page.read_text())
    }
    return sorted(pairs)


def test_there_are_pages():
    assert {"architecture.md", "data.md", "stages.md", "checkpoints.md", "extending.md"} <= {
        page.name for page in PAGES
    }


def commands() -> list[tuple[str, str]]:
    """Command lines in code blocks and between backticks; what a command printed is none."""
    pairs = set(found(r"`mmfusion ([a-z][^`\n]*)`"))
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```$", page.read_text(), re.M | re.S):
            pairs |= {(page.name, c) for c in re.findall(r"(?m)^(?:\$ )?mmfusion (.*)$", block)}
    return sorted((page, command) for page, command in pairs if ": error: " not in command)


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_exists_with_its_options(page, command):
    words = shlex.split(command)
    names = [n for n in (" ".join(words[:2]), words[0]) if n in (*RECIPE_COMMANDS, *TOOLS)]
    assert names, f"{page}: there is no command mmfusion {command}"
    if names[0] in TOOLS:
        module, function = TOOLS[names[0]][0].split(":")
        parameters = inspect.signature(getattr(import_module(module), function)).parameters
        given = [w[2:] for w in words if w.startswith("--")]
        if "overrides" in parameters:
            given = [w for w in given if "." not in w.partition("=")[0]]  # keys of a recipe
        names = (re.split("[=.]", w)[0] for w in given)
        options = {name.replace("-", "_") for name in names}
        assert options <= set(parameters)


@pytest.mark.parametrize(("page", "name"), found(r"\b(mmfusion(?:\.\w+)+)\b"))
def test_a_dotted_name_is_there(page, name):
    path = name.split(".")
    module = import_module("mmfusion")
    for length in range(2, len(path) + 1):
        if not hasattr(module, path[length - 1]):
            import_module(".".join(path[:length]))
        module = getattr(module, path[length - 1])


@pytest.mark.parametrize(("page", "key"), found(r"`((?:data|model|checkpoint)\.[a-z_]+)(?:[`.=])"))
def test_a_key_of_a_recipe_is_there(page, key):
    section, name = key.split(".")
    assert name in inspect.signature(SECTIONS[section].__init__).parameters


@pytest.mark.parametrize(("page", "link"), found(r"\]\(([\w./]+\.(?:md|py|yaml))(?:#[\w-]+)?\)"))
def test_a_linked_file_is_there(page, link):
    assert (ROOT / "docs" / link).is_file()


@pytest.mark.parametrize(("page", "anchor"), found(r"\]\(([\w./]+\.md#[\w-]+)\)"))
def test_a_linked_heading_is_there(page, anchor):
    file, name = anchor.split("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / file).read_text(), re.M)
    assert name in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


def test_the_layout_of_the_architecture_names_every_module_and_no_other():
    layout = (ROOT / "docs" / "architecture.md").read_text().split("## Layout")[1].split("```")[1]
    told = set(re.findall(r"\b(\w+)\b", layout))
    folders = ("", "processing", "data", "models", "training", "training/callbacks", "tools")
    modules = [p for f in folders for p in (ROOT / "mmfusion" / f).glob("*.py")]
    assert {p.stem for p in modules if p.stem != "__init__"} <= told
    files = {p.name for p in (ROOT / "mmfusion").rglob("*.py")}
    assert set(re.findall(r"\b\w+\.py\b", layout)) <= files
