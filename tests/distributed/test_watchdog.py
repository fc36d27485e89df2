"""Of two ranks one stands still: both say what they are doing and on which samples, and end."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from mmfusion.training.callbacks.watchdog import HUNG, Watchdog
from tests.training import jobs
from tests.training.tiny import HERE, fit, losses, write_recipe

STEP = 6


def watched(folder: Path, **watch: float) -> Path:
    return write_recipe(
        folder,
        trainer__devices="auto",
        trainer__max_steps=10,
        checkpoint__every_n_steps=2,
        trainer__callbacks=[
            {"class_path": "mmfusion.training.callbacks.watchdog.Watchdog", "init_args": watch},
            {"class_path": f"{HERE}.Hang", "init_args": {"rank": 1, "step": STEP}},
        ],
    )


@pytest.mark.slow
def test_ranks_that_stand_still_tell_why_and_end(tmp_path: Path) -> None:
    recipe = watched(tmp_path, least_seconds=4, slow_factor=5, end_minutes=0.2)
    run, begun = tmp_path / "run", time.monotonic()
    args = ["fit", "-c", str(recipe), f"--run_dir={run}"]
    codes = jobs.run_ranks(args, tmp_path / "log", 2)
    assert HUNG in codes  # where one ends first, the other finds its connection closed
    assert 0 not in codes
    assert time.monotonic() - begun < 120
    waits, sleeps = ((run / f"stuck-{rank}.txt").read_text() for rank in (0, 1))
    for rank, told in enumerate((waits, sleeps)):
        assert f"rank {rank}: step {STEP} takes" in told
        assert f"rank {rank}: step {STEP} takes" in (tmp_path / f"log.{rank}").read_text()
        assert "Samples of its last batch:\n  words: " in told
    assert "; the process ends." in waits + sleeps
    assert "tiny.py" in sleeps
    assert "in on_train_batch_start" in sleeps
    assert "tiny.py" not in waits
    assert "distributed_c10d.py" in waits
    assert json.loads((run / "status.json").read_text())["state"] == "running"  # as after a kill


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    run = fit(write_recipe(tmp_path, trainer__max_steps=4))
    assert len(losses(run)) == 4
    assert not list(run.path.glob("stuck-*"))


@pytest.mark.parametrize("options", [{"slow_factor": 1}, {"least_seconds": 0}, {"end_minutes": -1}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected a factor above 1 and times above 0"):
        Watchdog(**options)
