"""What Lightning and mmfusion add to a step: beside each step of a real run the same step is taken
by a bare PyTorch loop, on the same packs with a copy of the same model; before it and after it in
turn, as the second to see new shapes finds kernels made and caches warm.

    python -m tests.benchmarks.step_time recipes/quickstart/1_align_input.yaml --steps 40

Prints (time of a step of the run) / (time of the bare step): the geometric mean of the medians of
the two orders. The run's time is all that passes between two bare steps: fetching, logging, every
callback. The batches of both are made beforehand: a bare loop would need the same loader, and here
it would work beside only one of them. What loading costs a run is its throughput/wait_share.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
import torch

from mmfusion.cli import main
from mmfusion.types import Batch

WARMUP = 5


class Made:
    """Batches made beforehand."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = list(batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


class BareLoop(L.Callback):
    """Beside every step of the run, the same step without any of it; times both."""

    def __init__(self) -> None:
        self.ratios: list[float] = []
        self.seconds: list[tuple[float, float]] = []
        self._bare: Any = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        make = data.train_dataloader

        def made_beforehand() -> Made:
            count = (trainer.max_steps + 1) * trainer.accumulate_grad_batches
            return Made(itertools.islice(make(), count))

        data.train_dataloader = made_beforehand

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._model = copy.deepcopy(pl_module.model)
        self._objectives = copy.deepcopy(pl_module.objectives)
        names = {id(p): name for name, p in pl_module.model.named_parameters()}
        own = dict(self._model.named_parameters())
        groups = [
            {**group, "params": [own[names[id(p)]] for p in group["params"]]}
            for group in pl_module.groups
        ]
        self._optimizer = pl_module.make_optimizer(groups)
        self._schedule = pl_module.schedule(self._optimizer, trainer.max_steps)
        self._clip = trainer.gradient_clip_val
        self._bf16 = "bf16" in str(trainer.precision)
        self._splits = trainer.accumulate_grad_batches
        self._parameters = [p for group in groups for p in group["params"]]
        self._spent, self._since = 0.0, time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx // self._splits % 2:
            self._take(batch, batch_idx)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx // self._splits % 2 == 0:
            self._take(batch, batch_idx)
        if (batch_idx + 1) % self._splits == 0:
            now = time.perf_counter()
            self.seconds.append((now - self._since - self._spent, self._spent))
            self._spent, self._since = 0.0, now

    def _take(self, batch: Batch, batch_idx: int) -> None:
        begun = time.perf_counter()
        self._step(batch, last=(batch_idx + 1) % self._splits == 0)
        self._spent += time.perf_counter() - begun

    def _step(self, batch: Batch, last: bool) -> None:
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self._bf16):
            output = self._model(batch)
            losses = [loss(self._model, output, batch) for loss in self._objectives.values()]
            total = torch.stack([loss.total for loss in losses]).sum() / batch.step_counts["tokens"]
        (total + output.idle).backward()
        if last:
            if self._clip:
                torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
            float(total.detach())


def run() -> None:
    """Measure one recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=40)
    options, more = parser.parse_known_args()
    found: list[BareLoop] = []
    original = BareLoop.on_train_start

    def remember(self: BareLoop, *args: Any) -> None:
        found.append(self)
        original(self, *args)

    BareLoop.on_train_start = remember  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["fit", "-c", options.recipe, f"--run_dir={folder}/run"]
        arguments += [f"--trainer.max_steps={options.steps}", "--wandb=off"]
        arguments += ["--trainer.callbacks=tests.benchmarks.step_time.BareLoop", *more]
        main(arguments)
    seconds = found[0].seconds[WARMUP:]
    first, second = (statistics.median(run / bare for run, bare in seconds[i::2]) for i in (0, 1))
    low, _, high = statistics.quantiles([run / bare for run, bare in seconds], n=4)
    print(
        f"step of the run / bare step: {math.sqrt(first * second):.3f}, from the medians of both "
        f"orders {first:.3f} and {second:.3f} (quartiles of all {low:.3f} to {high:.3f}), "
        f"{len(seconds)} steps; medians {statistics.median(s for s, _ in seconds):.3f} s and "
        f"{statistics.median(s for _, s in seconds):.3f} s"
    )


if __name__ == "__main__":
    from tests.benchmarks import step_time  # the class that the recipe names, not __main__'s

    step_time.run()
