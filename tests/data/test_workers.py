"""Loader processes under the signals that stop a run."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from mmfusion.data.loader import _data_loader, _start
from mmfusion.data.workers import Workers

ITEMS = 40


class Numbers(Dataset):
    def __len__(self):
        return ITEMS

    def __getitem__(self, i):
        return i


def _note(came, number, frame):
    came.append(number)


def signal_the_group(start_method: str) -> None:
    """Take some batches, signal every process of the group, take the rest."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for taken in (0, 3):  # 0: while loaders start
            came: list[int] = []
            signal.signal(number, partial(_note, came))
            batches = _start(_data_loader(Numbers(), Workers(2, start_method), persistent=False))
            first = [next(batches) for _ in range(taken)]
            os.killpg(0, number)
            assert first + list(batches) == list(range(ITEMS)), (number, taken)
            assert came == [number], (number, taken)


@pytest.mark.slow
@pytest.mark.parametrize(
    "start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow), "forkserver"]
)
def test_a_signal_to_the_whole_group_loses_no_batch(start_method):
    """Also one that comes while loaders are starting, and with a fork server between."""
    code = f"from {__name__} import *; signal_the_group({start_method!r})"
    program = [sys.executable, "-c", f"if __name__ == '__main__':\n    {code}"]
    done = subprocess.run(
        program, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
