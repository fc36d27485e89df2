"""Loader processes: how many, how they start, and what they do with the signals that stop a run.

A terminal's Ctrl-C, torchrun and Slurm send their signal to every process of the run, loaders
included. The trainer then still needs the batches of the step it finishes, so loaders leave them
to it, until the interpreter exits and ends them. So must the fork server, where there
is one (Python 3.14's default): a loader ends itself when the process that forked it has gone.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import resource_tracker
from types import FrameType

from mmfusion.stopping import STOPPING, WARNINGS, held


@dataclass(frozen=True)
class Workers:
    """How batches are made.

    Attributes:
        count: loader processes; 0 makes them in the main process.
        start_method: fork, spawn or forkserver; None takes the platform's.
    """

    count: int = 0
    start_method: str | None = None


@contextmanager
def signals_held() -> Iterator[None]:
    """Start loaders in it: what is started has these signals blocked, as here. A loader opens
    itself to them when its handlers are set, the fork server never.
    """
    with held(*WARNINGS):
        resource_tracker.ensure_running()  # where it is started, it unblocks SIGINT and SIGTERM
        with held(*STOPPING):
            yield


@cache
def leave_signals(start_method: str | None) -> LeaveSignals:
    """The ``worker_init_fn`` of the loaders started by a method; one of each in a process."""
    leave = LeaveSignals(start_method)
    atexit.register(leave.end)
    return leave


class LeaveSignals:
    """Called in a loader process: from then on SIGTERM means something to it once its parent is
    ending, and no other signal of those does.
    """

    def __init__(self, start_method: str | None) -> None:
        self._ending = multiprocessing.get_context(start_method).RawValue("b", 0)

    def __call__(self, worker: int) -> None:
        for number in (signal.SIGINT, *WARNINGS):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self._ending.value:
            os._exit(0)

    def end(self) -> None:
        """In the parent: end what is left of its loaders. One may be in the midst of a long step,
        and is waited for at exit otherwise.
        """
        self._ending.value = 1
        for child in multiprocessing.active_children():
            if child.daemon:
                child.terminate()
