"""When checkpoints are written and which stay."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from mmfusion.stopping import STOPPING, RunInterrupted
from mmfusion.training.checkpoint import (
    FOLDER,
    LATEST,
    UNFINISHED,
    AtomicCheckpointIO,
    replace_text,
)
from mmfusion.training.module import MultimodalModule
from mmfusion.training.remote import RemoteCopy
from mmfusion.training.resume import by_step

log = logging.getLogger(__name__)


DEADLINE = "MMFUSION_DEADLINE"
"""Time (seconds since 1970) from which on a run behaves as if it had got SIGUSR1."""
STOPPING_TEXT = b"""
stopping: the step under way, or the next one, is finished and saved first; once more stops at once
"""


class RunCheckpoint(Checkpoint):
    """Saves the run every ``every_n_steps`` optimizer steps, at its end and when it is asked to
    stop.

    Each checkpoint is a file of its own, ``checkpoints/step-00000100.ckpt``; the small file
    ``latest`` names the newest and moves after it is complete; old ones go after that. A first
    Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 finishes the step, saves and stops; a second Ctrl-C or
    SIGTERM stops at once.

    Args:
        every_n_steps: optimizer steps between two checkpoints.
        keep_last: how many of the newest stay; at least 2.
        keep_every_n_steps: checkpoints at multiples of this stay for good (None: none do).
        behind: write while training goes on. A step then waits for a copy in the host's memory
            alone, which takes as much of that as the checkpoint takes on disk; where one is still
            being written when the next is due, that one is left out. The last one is waited for.
        remote: a folder that each checkpoint is copied to as well, as fsspec names it
            (``s3://bucket/runs/mine``, ``/other/disk``); where the run directory has none, the run
            goes on from there. A copy that fails is told, and does not stop the run.
    """

    def __init__(
        self,
        every_n_steps: int = 200,
        keep_last: int = 2,
        keep_every_n_steps: int | None = None,
        behind: bool = False,
        remote: str | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps is {every_n_steps}; expected 1 or more.")
        if keep_last < 2:
            raise ValueError(
                f"checkpoint.keep_last is {keep_last}; expected 2 or more: the newest may be torn."
            )
        if keep_every_n_steps is not None and keep_every_n_steps < 1:
            raise ValueError(
                f"checkpoint.keep_every_n_steps is {keep_every_n_steps}; expected 1 or more, or "
                "null to keep none for good."
            )
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.keep_every_n_steps = keep_every_n_steps
        self.behind = behind
        self.remote = RemoteCopy(remote) if remote else None
        self.folder = Path(FOLDER)
        self._saved_step = -1
        self._signal = 0
        self._deadline = math.inf
        self._stopping: RunInterrupted | None = None
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The trainer's root folder is the run directory. The ranks agree on a stop once a step."""
        self.folder = Path(trainer.default_root_dir) / FOLDER
        cast(MultimodalModule, pl_module).flags["stop"] = self._asked
        self._deadline = float(os.environ.get(DEADLINE) or "inf")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals (after Lightning set its own)."""
        self._saved_step = trainer.global_step
        for number in STOPPING:
            self._handlers[number] = signal.signal(number, self._ask_to_stop)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save where a step ended that is due, is the last, or was interrupted."""
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stop = bool(cast(MultimodalModule, pl_module).agreed["stop"])
        final = stop or step == trainer.max_steps
        if final or step % self.every_n_steps == 0:
            self.save(trainer, final)
        if stop:
            self._stopping = RunInterrupted(self._signal or signal.SIGTERM, step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop where the last step was saved and its metrics written."""
        self._stop()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop before a validation."""
        self._stop()

    def _stop(self) -> None:
        if self._stopping is not None:
            log.warning(str(self._stopping))
            raise self._stopping

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save where the data ended before ``max_steps``."""
        self.save(trainer)
        self._release()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._release()

    def save(self, trainer: L.Trainer, final: bool = True) -> None:
        """Write this step's checkpoint, move ``latest``, then remove what is too old. Every rank
        calls it.

        Args:
            trainer: of the run.
            final: the run ends: wait until it is there.
        """
        step = trainer.global_step
        if step == self._saved_step:
            return
        files = self._files(trainer)
        if not final and bool(trainer.strategy.broadcast(files.busy)):
            log.warning("step %d is not saved: the checkpoint before is still written", step)
            return
        files.behind, files.done, files.raises = self.behind, self._published, False
        trainer.save_checkpoint(self.folder / f"step-{step:08d}.ckpt", weights_only=False)
        if final and files.failed is None:
            try:
                files.wait()
            except OSError as error:
                files.failed = error
        if told := str(trainer.strategy.broadcast(str(files.failed or ""))):
            raise files.failed or OSError(told)
        self._saved_step = step
        trainer.strategy.barrier("RunCheckpoint.save")

    def _files(self, trainer: L.Trainer) -> AtomicCheckpointIO:
        return cast(AtomicCheckpointIO, trainer.strategy.checkpoint_io)

    def _published(self, path: Path) -> None:
        """On the rank that wrote it."""
        replace_text(self.folder / LATEST, path.name + "\n")
        self._remove_old()
        if self.remote is not None:
            self.remote.take(by_step(self.folder))

    def _remove_old(self) -> None:
        for torn in self.folder.glob(UNFINISHED):
            torn.unlink()
        for path in by_step(self.folder)[: -self.keep_last]:
            step = int(path.stem.removeprefix("step-"))
            if not self.keep_every_n_steps or step % self.keep_every_n_steps:
                path.unlink()

    @property
    def signal(self) -> int:
        """The signal that asks this rank to stop, or 0. Where a run goes back, the next attempt is
        given it.
        """
        return self._signal

    @signal.setter
    def signal(self, number: int) -> None:
        self._signal = number

    def _asked(self) -> int:
        """Whether this rank is to stop."""
        if not self._signal and time.time() >= self._deadline:  # a signal that is sent once is lost
            self._ask_to_stop(signal.SIGUSR1, None)  # where a process is not yet there
        return int(self._signal != 0)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        os.write(2, STOPPING_TEXT)
        signal.signal(signal.SIGINT, self._handlers[signal.SIGINT])
        # A second one ends at once; Lightning's own handler would wait for the other ranks. Slurm
        # sends its warnings again and again, and SIGTERM soon after one.
        if number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _release(self) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._ask_to_stop:
                signal.signal(number, handler)
        self._handlers.clear()
