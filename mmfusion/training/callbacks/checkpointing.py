"""When checkpoints are written and which stay."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn

from mmfusion.data.datamodule import data_of
from mmfusion.stopping import STOPPING, RunInterrupted
from mmfusion.training.checkpoint import (
    FOLDER,
    LATEST,
    AtomicCheckpointIO,
    replace_text,
)
from mmfusion.training.frozen_weights import divided, fingerprints, other_weights
from mmfusion.training.manifest import Manifest
from mmfusion.training.module import MultimodalModule
from mmfusion.training.remote import RemoteCopy
from mmfusion.training.resume import by_step, remove, step_of
from mmfusion.training.rewind import Rewind
from mmfusion.training.run import fingerprint, now, versions
from mmfusion.training.shard_saves import ShardSaves

log = logging.getLogger(__name__)


DEADLINE = "MMFUSION_DEADLINE"
"""Time (seconds since 1970) from which on a run behaves as if it had got SIGUSR1."""
STOPPING_TEXT = b"""
stopping: the step under way, or the next one, is finished and saved first; once more stops at once
"""


class RunCheckpoint(Checkpoint):
    """Saves the run every ``every_n_steps`` optimizer steps, at its end and when it is asked to
    stop.

    Each checkpoint is a file of its own, ``checkpoints/step-00000100.ckpt``, or a folder where its
    strategy writes one, with a manifest (:mod:`mmfusion.training.manifest`); the small file
    ``latest`` names the newest and moves after it is complete; old ones go after that. A first
    Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 finishes the step, saves and stops; a second Ctrl-C or
    SIGTERM stops at once.

    Args:
        every_n_steps: optimizer steps between two checkpoints.
        keep_last: how many of the newest stay; at least 2.
        keep_every_n_steps: checkpoints at multiples of this stay for good (None: none do).
        behind: write while training goes on. A step then waits for a copy in the host's memory
            alone, which takes as much of that as the checkpoint (or this rank's share of it) takes
            on disk; where one is still being written when the next is due, that one is left out.
            The last one is waited for.
        sharded: a folder of files, one of each rank, in place of one file that rank 0 gathers: for
            large LLMs that train whole. Any number of ranks goes on from it.
        remote: a folder that each checkpoint is copied to as well, as fsspec names it
            (``s3://bucket/runs/mine``, ``/other/disk``); where the run directory has none, the run
            goes on from there. Training does not wait for copies, but its end does; one that fails
            is told, and does not stop the run.
    """

    def __init__(
        self,
        every_n_steps: int = 200,
        keep_last: int = 2,
        keep_every_n_steps: int | None = None,
        behind: bool = False,
        sharded: bool = False,
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
        self.sharded = sharded
        self.remote = RemoteCopy(remote) if remote else None
        self.folder = Path(FOLDER)
        self._made: dict[str, Any] = {}
        self._before: Manifest | None = None
        self._allow_change = False
        self._saved_step = -1
        self._shards = ShardSaves()
        self._signal = 0
        self._deadline = math.inf
        self._stopping: RunInterrupted | None = None
        self._handlers: dict[int, Any] = {}

    def start(
        self,
        run: str,
        recipe: Mapping[str, Any],
        before: Manifest | None,
        allow_change: bool = False,
    ) -> None:
        """What manifests are to say and frozen weights are compared with. Rank 0 alone calls it.

        Args:
            run: its id.
            recipe: resolved.
            before: of the checkpoint that the run goes on from.
            allow_change: go on though frozen weights are others.

        Raises:
            ValueError: where ``remote`` holds another run's checkpoints.
        """
        if self.remote is not None:
            self.remote.claim(run)
        self._made = {"run": run, "recipe": fingerprint(recipe), "versions": versions()}
        self._before, self._allow_change = before, allow_change
        if before is not None and (of := before.about.get("run", run)) != run:
            log.warning(
                "the checkpoint that is gone on from was written by run %s, not %s", of, run
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The trainer's root folder is the run directory. The ranks agree on a stop once a step."""
        self.folder = Path(trainer.default_root_dir) / FOLDER
        flags = cast(MultimodalModule, pl_module).flags
        flags["stop"], flags["writing"] = self._asked, self._shards.writing
        if hasattr(trainer.strategy, "sharded"):
            trainer.strategy.sharded = self.sharded
        self._deadline = float(os.environ.get(DEADLINE) or "inf")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare frozen weights; take over the signals (after Lightning set its own)."""
        self._check_frozen(trainer, cast(MultimodalModule, pl_module))
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
        agreed = cast(MultimodalModule, pl_module).agreed
        if not agreed["writing"]:
            self._shards.finish(self._files(trainer))
        stop = bool(agreed["stop"])
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
        """Stop before a validation, which may take long: shards count before it."""
        self._stop()
        if trainer.state.fn == TrainerFn.FITTING:
            self._shards.finish(self._files(trainer))

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
        """Give the signals back; where all ranks go back, to what they have just written too."""
        if isinstance(exception, Rewind):
            self._shards.finish(self._files(trainer))
        self._release()

    def save(self, trainer: L.Trainer, final: bool = True) -> None:
        """Write this step's checkpoint, move ``latest``, then remove what is too old. Every rank
        calls it.

        Args:
            trainer: of the run.
            final: the run ends: wait until it is there.
        """
        step, files = trainer.global_step, self._files(trainer)
        if final:
            self._shards.finish(files)
        if step != self._saved_step:
            busy = self._shards.unfinished or files.busy
            if not final and bool(trainer.strategy.broadcast(busy)):
                log.warning("step %d is not saved: the checkpoint before is still written", step)
                return
            self._begin(trainer, files)
            self._saved_step = step
        if final or not self.behind:
            self._shards.finish(files)
            try:
                files.wait()
            except OSError as error:
                files.failed = files.failed or error
        if told := str(trainer.strategy.broadcast(str(files.failed or ""))):
            raise files.failed or OSError(told)
        trainer.strategy.barrier("RunCheckpoint.save")

    def _begin(self, trainer: L.Trainer, files: AtomicCheckpointIO) -> None:
        files.behind, files.done, files.raises = self.behind, self._published, False
        files.about = self._about(trainer)
        name = f"step-{trainer.global_step:08d}"
        if self.sharded:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            self._shards.begin(files, checkpoint, self.folder / name, trainer.world_size)
        else:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt", weights_only=False)

    def _check_frozen(self, trainer: L.Trainer, module: MultimodalModule) -> None:
        """Refuse to go on with other frozen weights than before."""
        leads, changed = trainer.is_global_zero, ""
        frozen = fingerprints(module, leads) if leads or divided(module) else {}
        self._made |= {"frozen": frozen}
        if self._before is not None:
            changed = "\n  ".join(other_weights(self._before.about.get("frozen", {}), frozen))
            if changed and self._allow_change:
                log.warning("frozen weights are others than before:\n  %s", changed)
                changed = ""
        if not (changed := str(trainer.strategy.broadcast(changed))):
            return
        raise ValueError(
            "frozen weights are others than those that this run has trained with so far:\n  "
            f"{changed}\nPut back what was there (of a hub id: set its revision to the commit), "
            "start a new run with model.init_from, or go on with these by --allow_recipe_change."
        )

    def _about(self, trainer: L.Trainer) -> dict[str, Any]:
        strategy = cast(Any, trainer.strategy)
        kind = "ddp" if type(strategy) is DDPStrategy else type(strategy).__name__
        name = getattr(strategy, "strategy_name", kind)
        stage = getattr(strategy, "stage", None)
        sources = data_of(trainer).state.spec.sources
        return {
            **self._made,
            "step": trainer.global_step,
            "written": now(),
            "world_size": trainer.world_size,
            "strategy": name if stage is None else f"{name} stage {stage}",
            "data": {source.name: source.dataset_id for source in sources},
        }

    def _files(self, trainer: L.Trainer) -> AtomicCheckpointIO:
        return cast(AtomicCheckpointIO, trainer.strategy.checkpoint_io)

    def _published(self, path: Path) -> None:
        """On the rank that wrote it."""
        replace_text(self.folder / LATEST, path.name + "\n")
        self._remove_old()
        if self.remote is not None:
            self.remote.take_behind(self.folder)

    def _remove_old(self) -> None:
        for path in by_step(self.folder)[: -self.keep_last]:
            if self.remote is not None and self.remote.copying == path:
                continue  # goes with the next
            if not self.keep_every_n_steps or step_of(path) % self.keep_every_n_steps:
                remove(path)

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
