"""The benchmark runs on tiny parts and prints its figures."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.benchmarks import stored_features
from tests.training.pictures import prepare, recipe


@pytest.mark.slow
def test_the_ratios_are_printed_with_what_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recipe(prepare(tmp_path)))
    monkeypatch.setattr(sys, "argv", ["stored_features", path, "--steps=2", "--fp32"])
    stored_features.run()
    out = capsys.readouterr().out
    for what in ("step", "load"):
        (line,) = re.findall(rf"^{what}, live / stored: median [\d.]+ over 2 pairs.*$", out, re.M)
        assert line
    (furthest,) = re.findall(r"losses differ by (\S+)", out)
    assert float(furthest) < 1e-5
    (counts,) = re.findall(r"parameters: (.*) and (.*)", out)
    live, stored = (int(count.replace(",", "")) for count in counts)
    assert stored < live
