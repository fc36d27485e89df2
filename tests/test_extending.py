"""docs/extending.md, run as it is written: its code is a module outside the package, its recipe
trains.
"""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from mmfusion.cli import main
from mmfusion.training.rebuild import load_module
from tests.make_debug import make_debug

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()


def blocks(language: str) -> list[str]:
    """The page's code blocks in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch, assets):
    """A folder with the page's module, shard and recipe, and the debug recipe."""
    (tmp_path / "my_parts.py").write_text("\n\n".join(blocks("python")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MMFUSION_CACHE", str(tmp_path / "cache"))
    make_debug(tmp_path / "cache" / "debug")
    parts = importlib.import_module("my_parts")
    parts.write_riddles([p.read_bytes() for p in sorted(assets.glob("pictures/*.jpg"))[:12]])
    (tmp_path / "riddles.yaml").write_text(*blocks("yaml"))
    (tmp_path / "recipes").mkdir()
    shutil.copy(ROOT / "recipes" / "debug.yaml", tmp_path / "recipes")
    yield tmp_path
    del sys.modules["my_parts"]


def test_parts_from_a_file_outside_the_package_train(folder, capsys):
    commands = [shlex.split(line) for line in blocks("bash")[0].splitlines()]
    assert commands[0] == ["export", "PYTHONPATH=."]
    for _, *arguments in commands[1:]:
        few = ["--trainer.max_steps=2", "--model.schedule.warmup_steps=1"]
        main([*arguments, *(few if arguments[0] == "fit" else [])])
    described = capsys.readouterr().out
    assert "ColorHistogram" in described
    assert "GatedLinear" in described
    trained = load_module("runs/riddles")
    assert trained.model.encoders["image"].out_dim == 24
    gate = trained.model.input_projectors["image"].gate
    assert float(gate.detach()) != 0.5


def test_a_record_that_is_no_riddle_is_named(folder):
    parts = importlib.import_module("my_parts")
    with pytest.raises(parts.DataError, match="shard:key: a riddle needs jpg and json"):
        parts.Riddle()({"jpg": b""}, "shard", "key")
