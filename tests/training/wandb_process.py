"""A process that logs to W&B as a run does, and W&B's own reader."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.training import jobs

KEPT = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
"""This machine's environment, without an account of its own."""


def environment(home: Path, **more: str) -> dict[str, str]:
    """Of a process with an empty home."""
    fonts = str(Path("~/.cache/matplotlib").expanduser())  # not searched for in every test
    return {**KEPT, "HOME": str(home), "MPLCONFIGDIR": fonts, **more}


class Logging:
    """A process that logs ``count`` steps from ``first`` on, then finishes, or is killed 2 seconds
    later.

    Args:
        run_dir: of its run.
        env: what leads to a server.
        attempt, first, count: which steps.
        pause: seconds between them.
        end: ``finish`` or ``kill``.
        choice, nodes: of the loggers.
    """

    def __init__(
        self,
        run_dir: Path,
        env: dict[str, str] | None = None,
        attempt: int = 1,
        first: int = 1,
        count: int = 3,
        pause: float = 0.0,
        end: str = "finish",
        choice: str = "auto",
        nodes: int = 1,
    ) -> None:
        home = run_dir.parent / "home"
        home.mkdir(parents=True, exist_ok=True)
        self.end, self.out = end, run_dir.parent / f"said-{attempt}.txt"
        steps = (attempt, first, count, pause, end, choice, nodes)
        given = (str(run_dir), environment(home, **(env or {})), str(self.out), *steps)
        self.process = jobs.CONTEXT.Process(target=_log, args=given)
        self.process.start()

    def started(self) -> None:
        """Wait until it has begun to log."""
        while "began in" not in self.said():
            assert self.process.is_alive(), self.said()
            time.sleep(0.05)

    def ended(self, timeout: float = 120) -> str:
        """What it said, when it has ended as it should."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"it goes on and on:\n{self.said()}")
        assert self.process.exitcode == (-9 if self.end == "kill" else 0), self.said()
        return self.said()

    def said(self) -> str:
        return self.out.read_text() if self.out.exists() else ""


def _log(
    run_dir: str, env: dict[str, str], out: str, attempt: int, first: int, count: int,
    pause: float, end: str, choice: Any, nodes: int,
) -> None:  # fmt: skip
    os.environ.clear()
    os.environ.update(env)
    said = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    from mmfusion.training.trackers import default_loggers

    loggers = default_loggers(run_dir, "fixedid", attempt, choice, timeout=2, nodes=nodes)
    began = time.monotonic()
    for logger in loggers:
        logger.log_hyperparams({"lr": 0.1, "api_key": "SECRETSECRET"})
    print(f"began in {time.monotonic() - began:.1f} s", flush=True)
    began = time.monotonic()
    for step in range(first, first + count):
        for logger in loggers:
            logger.log_metrics({"train/loss": 1.0 / step}, step=step)
        time.sleep(pause)
    print(f"logged in {time.monotonic() - began:.1f} s", flush=True)
    if end == "kill":
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    for logger in loggers:
        logger.finalize("success")
    print(f"finished in {time.monotonic() - began:.1f} s", flush=True)


def mmfusion(folder: Path, env: dict[str, str], *args: str) -> str:
    """The command, in a process of its own; what it says."""
    home, said = folder / "home", folder / f"said-{len(list(folder.glob('said-*')))}.txt"
    home.mkdir(exist_ok=True)
    code = jobs.run(args, said, env={"HOME": str(home), "WANDB_MODE": "online", **env})
    assert code == 0, said.read_text()
    return said.read_text()


def log_steps(run_dir: Path, env: dict[str, str] | None = None, **how: Any) -> str:
    """Run one to its end."""
    return Logging(run_dir, env, **how).ended()


def records(segment: Path) -> list[dict[str, Any]]:
    """The documented reader of .wandb files."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(segment)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def points(history: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """Attempt, step and loss of what was logged."""
    return [
        (row["trainer/attempt"], row["trainer/global_step"], row["train/loss"])
        for row in history
        if "train/loss" in row
    ]


def steps(attempt: int, *numbers: int) -> list[tuple[float, float, float]]:
    """What a start logs in these steps."""
    return [(attempt, step, 1.0 / step) for step in numbers]
