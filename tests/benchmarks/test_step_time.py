"""The benchmark runs on tiny parts and prints its figures."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.benchmarks import step_time
from tests.training.tiny import write_recipe


def test_the_ratio_is_printed_with_those_of_both_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path))
    monkeypatch.setattr(sys, "argv", ["step_time", recipe, "--steps=2", "--data.seed=3"])
    monkeypatch.setattr(step_time, "WARMUP", 0)
    monkeypatch.setattr(step_time.BareLoop, "on_train_start", step_time.BareLoop.on_train_start)
    step_time.run()
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step of the run")]
    assert " 2 steps; " in line
    ratio, first, second, low, high, *_ = map(float, re.findall(r"\d+\.\d+", line))
    assert ratio == pytest.approx((first * second) ** 0.5, abs=2e-3)
    assert 0 < low <= high
