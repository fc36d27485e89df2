"""Weak scaling from one process to two, as much work for each: mmfusion under its strategies beside
bare DistributedDataParallel.

    python -m tests.benchmarks.mid_size runs/mid_size
    OMP_NUM_THREADS=1 python -m tests.benchmarks.weak_scaling runs/mid_size/recipe.yaml

Around every step of a real run on two processes a plain PyTorch loop, without Lightning, takes the
same micro-batch with a copy of the same model under bare DDP, and after that rank 0 alone with one
more copy, while the other waits asleep. All three are seconds apart, so a load that comes and goes
weighs on each alike. The loop goes before the run's step and after it in turn. A run of one process
does the same without DDP. Printed are medians over steps of ratios of neighbours, with quartiles:

- efficiency of bare DDP: a bare step alone / one on two processes;
- run / bare: what mmfusion and the strategy add to a step;
- efficiency: the run's step on one process / on two, each in bare steps alone beside it.

Each by the clock, and by the CPU time of the slower process: waiting for the other rank is in the
first alone, and so is what else the machine does.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmfusion.types import Batch
from tests.benchmarks.step_time import Made
from tests.training import jobs

WARMUP = 2
STRATEGIES = ("ddp", "deepspeed_2", "deepspeed_3", "fsdp2")
Row = dict[str, float]


class Losses(nn.Module):
    """Model and objectives as one module, whose forward pass gives the loss of a micro-batch."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.model = copy.deepcopy(module.model)
        self.objectives = copy.deepcopy(module.objectives)

    def forward(self, batch: Batch) -> Tensor:
        output = self.model(batch)
        losses = [loss(self.model, output, batch) for loss in self.objectives.values()]
        total = torch.stack([loss.total for loss in losses]).sum()
        return total / batch.step_counts["tokens"] + output.idle


class Bare:
    """A training step in plain PyTorch.

    Args:
        module: what is copied, before a strategy divides it.
        ranks: under DistributedDataParallel.
    """

    def __init__(self, module: Any, ranks: bool) -> None:
        self.losses: nn.Module = Losses(module).train()
        names = {id(p): name for name, p in module.model.named_parameters()}
        own = dict(self.losses.model.named_parameters())  # type: ignore[union-attr]
        groups = [{**g, "params": [own[names[id(p)]] for p in g["params"]]} for g in module.groups]
        self.optimizer = module.make_optimizer(groups)
        self.parameters = [p for group in groups for p in group["params"]]
        if ranks:
            self.losses = DistributedDataParallel(self.losses)

    def step(self, batch: Batch) -> Tensor:
        """Seconds of it, by the clock and of this process's work."""
        begun = now()
        self.losses(batch).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return now() - begun


def now() -> Tensor:
    """(2,) the clock, and the CPU time of all threads of this process."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


class Beside(L.Callback):
    """The bare steps beside those of the run; writes the seconds of each to a file.

    Args:
        out: the file, ``.RANK`` added.
    """

    def __init__(self, out: str) -> None:
        self.out, self.rows = Path(out), list[Row]()

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Batches are made beforehand; copies before the strategy divides the model."""
        torch.set_num_threads(1)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        make, begin = data.train_dataloader, trainer.strategy.setup
        data.train_dataloader = lambda: Made(itertools.islice(make(), trainer.max_steps + 1))

        def copy_and_begin(of: L.Trainer) -> None:
            two = of.world_size > 1
            self.bare = Bare(pl_module, ranks=True) if two else None
            self.alone = Bare(pl_module, ranks=False) if of.global_rank == 0 else None
            begin(of)

        trainer.strategy.setup = copy_and_begin  # type: ignore[method-assign]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._spent, self._since = torch.zeros(2, dtype=torch.float64), now()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx % 2:
            self._take(batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx % 2 == 0:
            self._take(batch)
        end = now()
        self._note("run", end - self._since - self._spent)
        self.rows.append(self._row)
        self._spent, self._since = torch.zeros(2, dtype=torch.float64), end
        file = self.out.with_suffix(f".{trainer.global_rank}")
        file.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def _take(self, batch: Batch) -> None:
        begun, self._row = now(), {}
        _wait()
        if self.bare is not None:
            self._note("bare", self.bare.step(batch))
            _wait()
        if self.alone is not None:
            self._note("alone", self.alone.step(batch))
        _wait()
        self._spent += now() - begun

    def _note(self, name: str, seconds: Tensor) -> None:
        self._row[name], self._row[f"{name}, work"] = seconds.tolist()


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def measure(recipe: str, strategy: str, world: int, steps: int) -> list[Row]:
    """The seconds of each step: of the slower rank, where there are two."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "rows"), Path(folder, "log")
        args = ["fit", "-c", recipe, f"--run_dir={folder}/run", f"--strategy={strategy}"]
        args += [f"--trainer.devices={world}", f"--data.packs_per_step={world}"]
        args += [f"--trainer.max_steps={steps}", "--trainer.callbacks=" + NAME]
        args += [f"--trainer.callbacks.out={out}"]
        codes = jobs.run_ranks(args, log, world)
        if set(codes) != {0}:
            raise RuntimeError("".join(path.read_text() for path in Path(folder).glob("log.*")))
        ranks = [
            [json.loads(line) for line in out.with_suffix(f".{rank}").open()]
            for rank in range(world)
        ]
    steps_of_all = zip(*ranks, strict=True)
    slower = [{k: max(r[k] for r in rows if k in r) for k in rows[0]} for rows in steps_of_all]
    return slower[WARMUP:]


def ratio(rows: list[Row], above: str, below: str) -> tuple[float, float, float]:
    """Both orders' medians, their geometric mean; the quartiles of all."""
    ratios = [row[above] / row[below] for row in rows]
    median = math.sqrt(statistics.median(ratios[::2]) * statistics.median(ratios[1::2]))
    low, _, high = statistics.quantiles(ratios, n=4)
    return median, low, high


def report(strategy: str, one: list[Row], two: list[Row]) -> str:
    """The lines of a strategy: by the clock, and by CPU time."""
    lines = [f"{strategy}, {len(one)} and {len(two)} steps:"]
    for name, kind in (("clock", ""), ("work", ", work")):
        run, bare, alone = (f"{key}{kind}" for key in ("run", "bare", "alone"))
        efficiency = ratio(one, run, alone)[0] / ratio(two, run, alone)[0]
        seconds = ", ".join(
            f"{key} {statistics.median(row[key] for row in two):.2f} s"
            for key in (run, bare, alone)
        )
        lines.append(
            f"  {name}: efficiency {efficiency:.2f}, of bare DDP {_told(ratio(two, alone, bare))}; "
            f"run / bare on two {_told(ratio(two, run, bare))}, on one "
            f"{_told(ratio(one, run, alone))}; medians on two: {seconds}"
        )
    return "\n".join(lines)


def _told(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})"


def main() -> None:
    """Measure one recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--steps", type=int, default=14)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for strategy in options.strategies:
        rows = [measure(options.recipe, strategy, world, options.steps) for world in (1, 2)]
        print(f"{report(strategy, *rows)}\n  load {os.getloadavg()[0]:.1f}", flush=True)


NAME = "tests.benchmarks.weak_scaling.Beside"

if __name__ == "__main__":
    main()
