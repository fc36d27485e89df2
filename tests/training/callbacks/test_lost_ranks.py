"""A rank that waits for others in vain says whose silence it is."""

from __future__ import annotations

import json
import os
import platform
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from mmfusion.training.callbacks.lost_ranks import LostRanks
from tests.training import jobs
from tests.training.tiny import write_recipe


class Freeze(L.Callback):
    """A rank's process stands still with all its threads, as where its host is gone."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
def test_the_rank_that_is_left_names_the_other(tmp_path: Path, frozen: int) -> None:
    """Also where the process group's store is gone with it."""
    freeze = {"class_path": f"{__name__}.Freeze", "init_args": {"rank": frozen}}
    recipe = write_recipe(tmp_path, trainer__callbacks=[freeze], trainer__devices="auto")
    args = ["fit", "-c", str(recipe), f"--run_dir={tmp_path}/run", "--timeout_minutes=0.1"]
    ranks = jobs.start_ranks(args, tmp_path / "log", 2, env={"MMFUSION_TRACEBACK": "1"})
    left = 1 - frozen
    try:
        ranks[left].join(120)
        code = ranks[left].exitcode
    finally:
        for rank in ranks:
            rank.kill()
    said, host = (tmp_path / f"log.{left}").read_text(), platform.node()
    assert code == 1, said
    assert (
        f"ConnectionError: rank {left} on {host} has heard nothing of rank {frozen} on {host} for "
        "6 seconds (timeout_minutes)."
    ) in said, said
    if left == 0:
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert status["reason"].startswith("ConnectionError: rank 0 on ")


def test_other_errors_mean_what_they_say() -> None:
    watch = LostRanks(10)
    lost = RuntimeError("Connection closed by peer [10.0.0.1]:1")
    assert watch.told(lost) is None  # alone
    watch._hosts = ["one", "two"]
    assert watch.told(RuntimeError("out of memory")) is None
    told = watch.told(lost)
    assert told is not None
    assert told.startswith("rank 0 on one has lost the connection to another rank of 2, whose")
