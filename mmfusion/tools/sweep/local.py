"""A trial on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mmfusion.stopping import PREEMPTED
from mmfusion.tools.launch.job import Job
from mmfusion.tools.sweep.trials import Trial

AGENTS = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")
STOPPED = (PREEMPTED, 128 + signal.SIGINT)


def run_one(job: Job, trial: Trial, count: int, metric: str) -> None:
    """Run it to its end; what it says goes to ``fit.log`` in its directory.

    Raises:
        SystemExit: where it was asked to stop, with its code.
    """
    trial.run.path.mkdir(parents=True, exist_ok=True)
    values = " ".join(word.removeprefix("--") for word in trial.overrides)
    print(f"{trial.run.path.name} of {count}: {values} ...", flush=True)
    began = time.monotonic()
    command = [sys.executable, "-m", "mmfusion", "fit", "-c"]
    environment = {name: value for name, value in os.environ.items() if name not in AGENTS}
    said = trial.run.path / "fit.log"
    with said.open("ab") as output:
        process = subprocess.Popen(
            [*command, *job.of_trial(trial.overrides, str(trial.run.path))],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it is told to stop by us, once
        )
        with _passed_on(process):
            code = process.wait()
    if code in STOPPED:
        print(f"    stopped at step {trial.run.status().get('step', 0)}; the same line goes on")
        raise SystemExit(code)
    value = trial.result(metric)
    shown = "no value" if value is None else f"{value:.6g}"
    print(f"    {trial.state}: {metric} {shown}, {time.monotonic() - began:.0f} s")
    if code:
        print(f"    code {code}; the end of {said}:\n{_end_of(said.read_text(errors='replace'))}")


@contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals that ask to stop go to the trial, which saves; a second Ctrl-C ends it at once."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_of(text: str) -> str:
    return "\n".join(f"    | {line}" for line in text.strip().splitlines()[-3:])
