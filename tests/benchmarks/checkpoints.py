"""Time and size of a checkpoint: ours against Lightning's default, of the same run, in turn.

    python -m tests.benchmarks.mid_size runs/mid_size
    python -m tests.benchmarks.checkpoints runs/mid_size/recipe.yaml
    python -m tests.benchmarks.checkpoints runs/mid_size/full.yaml --strategy fsdp2 --processes 2

- ours: what trains, written aside, flushed to disk (fsync), renamed;
- behind: the same with ``checkpoint.behind``: how long a step waits, and until it is there;
- Lightning's: every weight, pickled in memory, written and moved without a flush. Not where weights
  are divided: its own checkpoints are then of another kind.

All begin with nothing of an earlier file still to be written, so that nobody pays for another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from mmfusion.training.checkpoint import AtomicCheckpointIO
from tests.training import jobs


class SaveInTurn(L.Callback):
    """After a few steps saves the run in each of the ways, round by round.

    Args:
        out: JSON file of rank 0: seconds and bytes, a list each.
        rounds: of all ways; the first is not kept.
        step: after which optimizer step.
    """

    def __init__(self, out: str, rounds: int = 6, step: int = 2) -> None:
        self.out, self.rounds, self.step = Path(out), rounds, step
        self.found: defaultdict[str, list[float]] = defaultdict(list)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step != self.step:
            return
        self._gathering = 0.0
        strategy: Any = trainer.strategy
        for name in ("lightning_module_state_dict", "optimizer_state"):
            setattr(strategy, name, self._timed(getattr(strategy, name)))
        for round_ in range(self.rounds):
            self._save(trainer, "ours")
            self._save(trainer, "behind", behind=True)
            if type(strategy).__name__ in ("SingleDeviceStrategy", "DDPStrategy"):
                self._save_as_lightning(trainer, pl_module)
            if round_ == 0:
                self.found.clear()
        if trainer.is_global_zero:
            self.out.write_text(json.dumps(self.found))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args)
            finally:
                self._gathering += time.perf_counter() - begun

        return timed

    def _save(self, trainer: L.Trainer, name: str, behind: bool = False) -> None:
        files: Any = trainer.strategy.checkpoint_io
        path = Path(trainer.default_root_dir) / f"{name}.ckpt"
        if trainer.is_global_zero:
            os.sync()
        trainer.strategy.barrier()
        self._gathering, begun = 0.0, time.perf_counter()
        if isinstance(files, AtomicCheckpointIO):
            files.behind = behind
        trainer.save_checkpoint(path)
        waited = time.perf_counter() - begun
        if behind:
            files.wait()
        self.found[f"{name}: seconds"].append(waited)
        self.found[f"{name}: of these gathering"].append(self._gathering)
        self.found[f"{name}: until it is there"].append(time.perf_counter() - begun)
        if trainer.is_global_zero:
            self.found[f"{name}: bytes"].append(path.stat().st_size)
            path.unlink()
        trainer.strategy.barrier()

    def _save_as_lightning(self, trainer: L.Trainer, module: Any) -> None:
        strategy, ours = trainer.strategy, trainer.strategy.checkpoint_io
        strategy.checkpoint_io = TorchCheckpointIO()
        module.on_save_checkpoint = lambda checkpoint: None
        try:
            self._save(trainer, "lightning")
        finally:
            strategy.checkpoint_io = ours
            del module.on_save_checkpoint


def measure(recipe: str, options: list[str], processes: int, rounds: int) -> dict[str, list[float]]:
    """Seconds and bytes by name."""
    with tempfile.TemporaryDirectory(dir=Path(recipe).parent) as folder:
        args = ["fit", "-c", recipe, f"--run_dir={folder}/run", "--trainer.max_steps=3", *options]
        args += [f"--trainer.devices={processes}", f"--data.packs_per_step={processes}"]
        args += [f"--trainer.callbacks={NAME}", f"--trainer.callbacks.out={folder}/found.json"]
        args += [f"--trainer.callbacks.rounds={rounds + 1}"]
        codes = jobs.run_ranks(args, Path(folder, "log"), processes)
        if set(codes) != {0}:
            raise RuntimeError("".join(path.read_text() for path in Path(folder).glob("log.*")))
        return json.loads(Path(folder, "found.json").read_text())


def main() -> None:
    """Measure one recipe under one strategy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    given = [f"--strategy={options.strategy}"]
    found = measure(options.recipe, given, options.processes, options.rounds)
    print(f"{options.strategy} on {options.processes}, {options.rounds} rounds:")
    for name, values in found.items():
        middle, unit = statistics.median(values), "MB" if name.endswith("bytes") else "s"
        told = [value / 1e6 if unit == "MB" else value for value in (middle, *values)]
        print(f"  {name}: {told[0]:.3f} {unit} ({min(told):.3f} to {max(told):.3f})")


NAME = "tests.benchmarks.checkpoints.SaveInTurn"

if __name__ == "__main__":
    main()
