"""W&B's measurements of every machine, in one run: two processes that take themselves for machines
of their own, as torchrun starts them with one process each.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmfusion.training.loggers import read_metrics
from mmfusion.training.run import RunDirectory
from tests.training import jobs
from tests.training.tiny import HERE, write_recipe
from tests.training.wandb_process import mmfusion
from tests.training.wandb_server import Server, serving

pytestmark = pytest.mark.slow
STEPS = 25


def train(folder: Path, env: dict[str, str]) -> RunDirectory:
    """25 steps of a tenth of a second, on two nodes."""
    slow = {"class_path": f"{HERE}.SlowSteps"}
    changes = {"trainer__devices": "auto", "trainer__callbacks": [slow]}
    recipe = write_recipe(folder, wandb="auto", trainer__max_steps=STEPS, **changes)
    home = {"HOME": str(folder / "home"), **env}
    ranks = jobs.start_ranks(
        ["fit", "-c", str(recipe)], folder / "log.txt", 2,
        env={"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", **home},
        of_each=lambda rank: {"GROUP_RANK": str(rank)},
    )  # fmt: skip
    for process in ranks:
        process.join()
        assert process.exitcode == 0, (folder / "log.0").read_text()
    return RunDirectory(folder / "run")


def check(server: Server, run: RunDirectory) -> None:
    """Every step once, and what each of two nodes does."""
    state = server.state()
    assert [*state["runs"]] == [run.id]
    found = server.run(run.id)
    rows = [row for row in found["history"] if "train/loss" in row]
    losses = [row["train/loss"] for row in read_metrics(run.path / "metrics.csv")]
    assert [row["train/loss"] for row in rows] == losses
    assert [row["trainer/global_step"] for row in rows] == [*range(STEPS)]
    measured = {key for line in found["events"] for key in json.loads(line)}
    for node in (0, 1):
        own = [key for key in measured if key.endswith(f"/l:node-{node}")]
        assert len(own) > 2, measured  # a run this short has no second look at the CPU
        assert all(key.startswith("system.") for key in own)
    assert not [key for key in measured if key.startswith("system.") and "/l:" not in key]


def test_online_all_nodes_share_the_run(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    with serving(tmp_path) as server:
        run = train(tmp_path, {"WANDB_MODE": "online", **server.environment})
        check(server, run)
        assert server.run(run.id)["complete"] is True


def test_offline_all_nodes_are_joined_by_the_sync(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    run = train(tmp_path, {"WANDB_MODE": "online"})  # and no key
    assert len(list(run.path.glob("wandb/offline-run-*"))) == 1
    assert len(list(run.path.glob("wandb/node-1/wandb/offline-run-*"))) == 1
    with serving(tmp_path) as server:
        mmfusion(tmp_path, server.environment, "sync", str(run.path))
        check(server, run)
