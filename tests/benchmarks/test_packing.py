"""The benchmark runs on tiny parts and prints its figures."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.benchmarks import packing
from tests.training.tiny import write_recipe


def test_the_ratio_is_printed_with_the_padding_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path))
    monkeypatch.setattr(sys, "argv", ["packing", recipe, "--steps=2", "--data.seed=3"])
    packing.run()
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("useful tokens/s")]
    assert "over 2 pairs" in line
    ratio, packed, padded = map(float, re.findall(r"\d+\.\d+", line))
    assert ratio > 0
    assert packed == 0
    assert padded > 10
