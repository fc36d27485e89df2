"""Tells why a run stands still, and ends it: what every rank is doing, and on which samples."""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO, cast

import lightning as L

from mmfusion.types import Batch

MOST_NAMED = 32
HUNG = os.EX_SOFTWARE
"""70, the code of a process that was ended."""


class Watchdog(L.Callback):
    """Where a step takes far longer than usual, each rank writes the stacks of all its threads and
    the samples of its batch to its standard error and to ``stuck-RANK.txt`` in the run directory; a
    while later it ends, so that whatever started it can start it again. Without it ranks
    that wait for one that hangs wait for the process group's timeout, and say no more than that.

    Args:
        slow_factor: a step is slow that takes so many times the median of the last ones.
        least_seconds: no step is slow that takes less.
        end_minutes: after which the process ends; outside of steps (in a validation, before the
            first one) four times that. None: never.
    """

    def __init__(
        self,
        slow_factor: float = 10.0,
        least_seconds: float = 60.0,
        end_minutes: float | None = 15.0,
    ) -> None:
        if slow_factor <= 1 or least_seconds <= 0 or (end_minutes or 1) <= 0:
            raise ValueError(
                f"watchdog: slow_factor is {slow_factor}, least_seconds {least_seconds} and "
                f"end_minutes {end_minutes}; expected a factor above 1 and times above 0."
            )
        self.slow_factor, self.least_seconds = slow_factor, least_seconds
        self.end_seconds = float("inf") if end_minutes is None else 60 * end_minutes
        self._folder = Path()
        self._steps: deque[float] = deque(maxlen=64)
        self._since = time.monotonic()
        self._batch: Batch | None = None
        self._at = ""
        self._rank = 0
        self._told = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- what the run does

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to watch."""
        self._rank, self._folder = trainer.global_rank, Path(trainer.default_root_dir)
        self._begin("the start")
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="Watchdog", daemon=True)
        self._thread.start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Which samples; what came between two steps is over."""
        self._batch = batch
        if not self._at.startswith("step"):
            self._begin(f"step {trainer.global_step}")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """A micro-batch is done."""
        if self._at.startswith("step"):
            self._steps.append(time.monotonic() - self._since)
        self._begin(f"step {trainer.global_step}")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validations take as long as they take."""
        self._begin("a validation")

    def on_validation_batch_end(self, *_: Any) -> None:
        """One that goes on."""
        self._begin("a validation")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Back to training; the first step after it is no measure of the others."""
        self._begin("the step after a validation")

    def on_save_checkpoint(self, *_: Any) -> None:
        """Takes its time as well."""
        self._begin("a checkpoint")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing to watch any more."""
        self._end()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Likewise."""
        self._end()

    # ---- what is made of it

    def _begin(self, what: str) -> None:
        self._at, self._since, self._told = what, time.monotonic(), False
        if self.end_seconds < float("inf"):
            # In case Python itself stands still: this one needs no interpreter.
            # (To the process's own stderr: another may stand for it that is no file.)
            seconds = self._ends_after() + 30
            faulthandler.dump_traceback_later(seconds, exit=True, file=cast(Any, sys.__stderr__))

    def _end(self) -> None:
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = self._batch = None

    def _ends_after(self) -> float:
        return self.end_seconds * (1 if self._at.startswith("step") else 4)

    def slow_after(self) -> float:
        """Seconds after which what goes on is slow."""
        if not (self._at.startswith("step") and self._steps):
            return self._ends_after()
        return max(self.least_seconds, self.slow_factor * statistics.median(self._steps))

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.least_seconds / 4)):
            waited = time.monotonic() - self._since
            over = waited > self._ends_after()
            if over or (waited > self.slow_after() and not self._told):
                self._told = True
                self._tell(waited, over)
            if over:
                os._exit(HUNG)

    def _tell(self, waited: float, over: bool) -> None:
        usual = f", usually {statistics.median(self._steps):.1f} s" if self._steps else ""
        fate = "; the process ends" if over else ""
        text = f"rank {self._rank}: {self._at} takes {waited:.0f} s so far{usual}{fate}."
        file = self._folder / f"stuck-{self._rank}.txt"
        with file.open("a+", encoding="utf-8") as kept:
            begin = kept.seek(0, os.SEEK_END)
            self._write(kept, text)
            kept.seek(begin)
            print(f"{kept.read()}(also in {file})", file=sys.stderr, flush=True)

    def _write(self, out: TextIO, text: str) -> None:
        named = self._batch.samples if self._batch is not None else []
        lines = [f"  {s.ref.source}: {s.shard} {s.key}" for s in named[:MOST_NAMED]]
        more = [f"  and {len(named) - MOST_NAMED} more"] if len(named) > MOST_NAMED else []
        out.write("\n".join([text, "Samples of its last batch:", *lines, *more, "Stacks:", ""]))
        out.flush()
        faulthandler.dump_traceback(out, all_threads=True)
        out.flush()
