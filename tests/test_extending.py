"""docs/extending.md, run as it is written: its code is a module outside the package, its recipe
trains.
"""

from __future__ import annotations

import importlib
import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmfusion.cli import main
from mmfusion.models.generators.base import PARTS, Sampling
from mmfusion.models.generators.noise import generators_of
from mmfusion.models.generators.pictures import as_png
from mmfusion.training.rebuild import load_module
from mmfusion.types import Conditioning, ConditioningSpec
from tests.make_debug import make_debug

ROOT = Path(__file__).parents[1]
WORDS = [torch.tensor([list(word)]) for word in (b"red", b"blue")]
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


def test_a_generator_from_outside_trains_and_draws(folder):
    parts = importlib.import_module("my_parts")
    torch.manual_seed(0)
    generator = parts.Swatch(dim=4)
    generator.build(PARTS)
    processor = generator.target_processor()
    pictures = [as_png(Image.new("RGB", (9, 12), colour)) for colour in ("red", "blue")]
    targets = processor.collate([processor(picture) for picture in pictures])
    optimizer, losses = torch.optim.Adam(generator.parameters(), 0.05), []
    for step in range(200):
        keys = [2 * step, 2 * step + 1]
        latents = generator.encode_media(targets, generators_of(keys, 1))
        given = Conditioning(torch.stack([generator.text_encoder(x) for x in WORDS]))
        losses.append(generator.denoising_loss(latents, given, keys).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-50:]) < 0.5 * sum(losses[:50])
    given, empty = generator.encode_text(["red", "blue"]), generator.encode_text([""])
    drawn = generator.sample(given, empty, Sampling(steps=20, guidance_scale=1.0))
    red, blue = (np.asarray(Image.open(io.BytesIO(media.data)))[0, 0] for media in drawn)
    assert red[0] > red[2]
    assert blue[2] > blue[0]


def test_an_output_projector_and_a_judge_from_outside_work(folder):
    parts = importlib.import_module("my_parts")
    spec = ConditioningSpec(tokens=3, dim=4)
    states = torch.randn(2, 5, 6)
    found = parts.Mean(6, spec, layers=[-1])({-1: states}, states)
    assert found.tokens.shape == (2, 3, 4)
    assert torch.equal(found.tokens[:, 0], found.tokens[:, 2])
    judge = parts.Brightness()
    assert judge.compute() == {}
    white, black = (as_png(Image.new("RGB", (9, 12), colour)) for colour in ("white", "black"))
    judge.update([white, black], [white, white])
    assert judge.compute() == {"bright_made": 0.5, "bright_true": 1.0}


def test_a_record_that_is_no_riddle_is_named(folder):
    parts = importlib.import_module("my_parts")
    with pytest.raises(parts.DataError, match="shard:key: a riddle needs jpg and json"):
        parts.Riddle()({"jpg": b""}, "shard", "key")
