"""How a run is asked to stop, from before torch is imported until its process ends.

Ctrl-C is a person's. SIGTERM (a cloud or Kubernetes takes the machine back) and SIGUSR1 or SIGUSR2
(Slurm, a while before the time is up) preempt the run: it is to go on later, perhaps elsewhere.
Here are only the handlers of a process that has nothing to save yet; once training starts
:class:`mmfusion.training.callbacks.checkpointing.RunCheckpoint` finishes the step and saves first.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

PREEMPTED = os.EX_TEMPFAIL
"""75, the code of a process that is to be started again."""
PREEMPTING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOPPING = (signal.SIGINT, *PREEMPTING)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
PATIENCE = 10.0
"""Seconds that a process which rank 0 has started leaves it to end first."""
AGENT = "TORCHELASTIC_RUN_ID"
"""Set where torchrun's agent has started this process."""


class RunInterrupted(SystemExit):
    """The run was asked to stop; it finished its step and saved, unless it was only starting.

    Its code is 130 after Ctrl-C, else 75. Under torchrun that is 0: an agent would take any other
    for a failure, and start its ranks again at once. ``status.json`` says ``preempted``.

    Args:
        number: of the signal.
        step: that was saved.
        saved: whether any was.
    """

    def __init__(self, number: int, step: int, saved: bool = True) -> None:
        self.preempted = number != signal.SIGINT
        by_agent = self.preempted and AGENT in os.environ
        super().__init__(0 if by_agent else PREEMPTED if self.preempted else 128 + number)
        self.step, self.saved = step, saved
        self.name = signal.Signals(number).name

    def __str__(self) -> str:
        how = "preempted" if self.preempted else "interrupted"
        if not self.saved:
            return (
                f"{how} by {self.name} while it started, nothing new to save; the same command "
                "goes on"
            )
        return (
            f"{how} by {self.name} after step {self.step}, saved; the same command goes on from "
            "here"
        )


@contextmanager
def held(*numbers: signal.Signals) -> Iterator[None]:
    """Block signals in this thread, and for good in the processes that are started meanwhile:
    Slurm sends its warning to each process of a step, and most would end by it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Inside, a signal ends the run at once. What comes from Slurm after it is ignored, not
    deadly: a run that has finished would look like one that failed.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        if _started_by_rank_0():
            _wait_for_parent()
        raise RunInterrupted(number, 0, saved=False)

    before = {number: signal.signal(number, stop) for number in PREEMPTING}
    try:
        yield
    except SystemExit as stopped:
        if isinstance(stopped.__context__, KeyboardInterrupt):
            raise RunInterrupted(signal.SIGINT, 0, saved=False) from None
        raise
    finally:
        for number, handler in before.items():
            deadly = number != signal.SIGTERM and handler == signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if deadly else handler)


def _started_by_rank_0() -> bool:
    """Whether Lightning has started this process from that of rank 0, not a launcher."""
    launched = (AGENT, "RANK", "SLURM_PROCID")
    return os.environ.get("LOCAL_RANK", "0") != "0" and not any(x in os.environ for x in launched)


def _wait_for_parent() -> None:
    """Rank 0 is told to stop as well. Did this process end before it, with a code other than 0,
    Lightning would kill it, and nobody would see the 75.
    """
    parent, until = os.getppid(), time.monotonic() + PATIENCE
    while os.getppid() == parent and time.monotonic() < until:
        time.sleep(0.05)
