"""The benchmark runs on tiny parts, and its figures are those of its rows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.benchmarks import weak_scaling
from tests.benchmarks.weak_scaling import Row, report
from tests.training.tiny import write_recipe


def row(run: float, bare: float, alone: float) -> Row:
    seconds = {"run": run, "bare": bare, "alone": alone}
    return seconds | {f"{name}, work": 2 * value for name, value in seconds.items()}


def test_a_load_on_the_machine_changes_no_ratio():
    """Two in three steps beside another process, which doubles what stands side by side."""
    loads = [1, 2, 2] * 4
    one = [row(1.1 * load, 0.0, 1.0 * load) for load in loads]
    two = [row(1.4 * load, 1.25 * load, 1.0 * load) for load in reversed(loads)]
    said = report("ddp", one, two)
    clock, work = said.splitlines()[1:]
    numbers = [float(x) for x in re.findall(r"\d+\.\d+", clock)]
    assert numbers[:10] == [0.79, 0.8, 0.8, 0.8, 1.12, 1.12, 1.12, 1.1, 1.1, 1.1]
    assert (
        work.partition("; medians")[0].split(":")[1]
        == clock.partition("; medians")[0].split(":")[1]
    )


@pytest.mark.slow
def test_two_processes_take_the_same_steps_with_and_without_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weak_scaling, "WARMUP", 0)
    recipe = write_recipe(tmp_path, data__packs_per_micro_batch=1)
    rows = weak_scaling.measure(str(recipe), "fsdp2", 2, 3)
    assert len(rows) == 3
    for found in rows:
        assert set(found) == set(row(0, 0, 0))
        assert all(seconds > 0 for seconds in found.values())
