"""A few kills of what ``python -m tests.distributed.kills`` does a hundred times."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import kills


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--kills=4", "--strategies=zero2", "--no-mixed", "--no-full"]
    (case,) = kills.main([*options, f"--folder={tmp_path}"])
    assert case.seen["kills"] >= 4
    assert case.seen["writing"] >= 2
    assert case.seen["runs"] >= 1
    assert case.furthest == 0.0
    assert "| zero2 x 2 | " in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_goes_on_where_the_disk_was_full(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    if not kills.may_mount(tmp_path / "disk"):
        pytest.skip("mounting a small disk needs root")
    (case,) = kills.main(["--kills=0", "--strategies=ddp", "--no-mixed", f"--folder={tmp_path}"])
    assert case.seen["full"] == case.seen["full resumed"] == 1
