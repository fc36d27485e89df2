"""How a process ends that has nothing to save yet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

WAITS = """
import sys, time
from mmfusion import stopping
stopping.PATIENCE = 2.0
with stopping.stopping_at_once():
    print("here", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("variables", "waits"),
    [
        ({}, False),
        ({"LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1"}, True),  # Lightning's, which kills rank 0 where this one ends first
        ({"LOCAL_RANK": "1", "RANK": "1"}, False),
        ({"LOCAL_RANK": "1", "SLURM_PROCID": "1"}, False),
    ],
)
def test_what_rank_0_has_started_lets_it_end_first(variables, waits):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], env={**os.environ, **variables}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert (time.monotonic() - asked >= 2.0) == waits
