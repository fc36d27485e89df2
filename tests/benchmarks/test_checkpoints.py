"""The benchmark saves real checkpoints in each of the ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.checkpoints import measure
from tests.training.tiny import write_recipe

pytestmark = pytest.mark.slow


def test_ours_keeps_what_trains_and_lightnings_all(tmp_path: Path) -> None:
    found = measure(str(write_recipe(tmp_path)), ["--strategy=ddp"], 1, rounds=2)
    assert {len(values) for values in found.values()} == {2}
    assert found["ours: bytes"] == found["behind: bytes"]
    assert min(found["lightning: bytes"]) > max(found["ours: bytes"])
    for waited, there in zip(
        found["behind: seconds"], found["behind: until it is there"], strict=True
    ):
        assert 0 < waited <= there
