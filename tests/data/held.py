"""A lock that another process holds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLD = """
import sys
from mmfusion.data.whole_file import alone
with alone(sys.argv[1], "holding it"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(path: Path, kill: bool = False) -> Iterator[None]:
    """Another process holds the lock in the block, and is killed, or ends, with it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield
    finally:
        if kill:
            process.kill()
        process.communicate()
