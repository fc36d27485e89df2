"""Enough of the W&B server on the loopback for the real client: runs that are made and resumed,
their lines and files, artifacts, sweeps with agents. It takes one key, and can be closed a while.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "k" * 40
ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Server:
    """One that is running."""

    url: str

    @property
    def environment(self) -> dict[str, str]:
        """What leads a client to it."""
        return {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": self.url}

    def state(self) -> dict[str, Any]:
        """All that it was sent."""
        with urllib.request.urlopen(f"{self.url}/state") as reply:
            return dict(json.load(reply))

    def run(self, name: str) -> dict[str, Any]:
        """One run, its history read."""
        found = self.state()["runs"][name]
        return {**found, "history": [json.loads(line) for line in found["history"]]}

    def file(self, path: str) -> bytes:
        """One that was put."""
        with urllib.request.urlopen(f"{self.url}/storage/{path}") as reply:
            return bytes(reply.read())

    def go_down(self, seconds: float) -> None:
        """From now on, for a while."""
        request = urllib.request.Request(f"{self.url}/down", str(seconds).encode())
        urllib.request.urlopen(request).close()


@contextmanager
def serving(folder: Path, *args: str) -> Iterator[Server]:
    """Start one, with a file in a folder that exists."""
    out = folder / "wandb_server.txt"
    command = [sys.executable, "-m", __name__, *args]
    with (
        out.open("w") as written,
        subprocess.Popen(command, stdout=written, cwd=ROOT, env=os.environ) as process,
    ):
        try:
            while not (port := out.read_text().partition("\n")[0]):
                assert process.poll() is None, "the server ended"
                time.sleep(0.05)
            yield Server(f"http://127.0.0.1:{port}")
        finally:
            process.kill()
