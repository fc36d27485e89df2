"""Memory is summed over all processes of a command, a shared page counted once."""

import re
import sys

import pytest

from tests.benchmarks import memory

FAMILY = """
import os, time
shared = bytearray(b"x") * (120 << 20)
for _ in range(2):
    if not os.fork():
        own = bytearray(b"y") * (60 << 20)
        time.sleep(2)
        os._exit(0)
time.sleep(2)
raise SystemExit(7)
"""


@pytest.mark.slow
def test_pages_that_processes_share_are_counted_once(capfd):
    code = memory.main([sys.executable, "-c", FAMILY], every=0.2)
    told = capfd.readouterr().out
    assert code == 7
    together, *parts, alone = map(float, re.findall(r"(\d+\.\d\d) GiB", told))
    assert len(parts) == 3
    assert 0.22 < together < 0.30  # GiB: 120 MiB + 2 x 60 MiB, and three interpreters
    assert sum(parts) - 0.02 < together < sum(parts) + 0.02
    assert 0.11 < alone < together
