"""The benchmark runs on few rows and prints its figures."""

from __future__ import annotations

import re
import sys

import pytest

from tests.benchmarks import bfloat16


def test_the_ratio_is_printed_for_both_widths(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bfloat16", "--rows=4", "--pairs=3"])
    bfloat16.run()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("computes bfloat16: ")
    found = [re.search(r"^(\d+) -> (\d+), .* median (\S+) over 3 pairs", line) for line in lines]
    assert [match and match[1] for match in found] == ["576", "1536"]
    assert all(match and float(match[3]) > 0 for match in found)
