"""A training step on stored features against the same step with live parts, turn by turn.

    python -m tests.benchmarks.stored_features recipes/quickstart/1_align_input.yaml --steps 12

Encodes the recipe's sources into a folder of its own first (or takes --features), then runs forward
and backward pass of both on the same packs; who goes first changes with each step, as the second
finds warm caches. Reading and decoding, which loader processes do, are timed apart. Prints the
median ratios and the parameters that were loaded.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

from mmfusion.cli import main
from mmfusion.training.rebuild import from_recipe
from mmfusion.types import Batch


class Side:
    """A module of the recipe, and its micro-batches."""

    def __init__(self, recipe: str, overrides: list[str]) -> None:
        self.module, data = from_recipe(recipe, ["--data.num_workers=0", *overrides])
        data.attach(self.module.model.processor())
        self._batches: Iterator[Batch] = iter(data.train_dataloader())
        self.module.configure_model()
        self.module.train()
        self.parameters = sum(p.numel() for p in self.module.parameters())
        self.steps: list[float] = []
        self.loads: list[float] = []
        self.losses: list[float] = []

    def step(self, autocast: bool) -> None:
        """Load a micro-batch, and run it forth and back."""
        begun = time.perf_counter()
        batch = next(self._batches)
        loaded = time.perf_counter()
        context: Any = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        torch.manual_seed(len(self.steps))
        with context:
            for objective in self.module.objectives.values():
                objective.begin_step(self.module.model, batch)
            output = self.module.model(batch)
            losses = self.module._losses(output, batch).values()
        total = torch.stack([loss.total for loss in losses]).sum()
        (total + output.idle).backward()
        self.module.zero_grad(set_to_none=True)
        self.steps.append(time.perf_counter() - loaded)
        self.loads.append(loaded - begun)
        self.losses.append(float(total.detach()))


def run() -> None:
    """Measure one recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--features", help="made before, of this recipe")
    parser.add_argument("--fp32", action="store_true", help="without bf16 autocast")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        out = options.features or f"{folder}/features"
        precision = [f"--trainer.precision={'32-true' if options.fp32 else 'bf16-mixed'}"]
        if not options.features:
            main(["data", "encode", options.recipe, "--out", out, *precision, *more])
        live = Side(options.recipe, [*precision, *more])
        stored = Side(options.recipe, [*precision, *more, f"--data.features={out}"])
        for step in range(options.steps + 1):
            for side in (live, stored) if step % 2 else (stored, live):
                side.step(not options.fp32)
    # The first step warms up.
    for what, a, b in (("step", live.steps, stored.steps), ("load", live.loads, stored.loads)):
        ratios = [x / y for x, y in zip(a[1:], b[1:], strict=True)]
        print(
            f"{what}, live / stored: median {statistics.median(ratios):.2f} over {len(ratios)} "
            f"pairs; medians {statistics.median(a[1:]):.4f} s and {statistics.median(b[1:]):.4f} s"
        )
    both = [(x + y, z + w) for x, y, z, w in zip(live.steps, live.loads, stored.steps, stored.loads,
                                                 strict=True)]  # fmt: skip
    print(f"step and load: median {statistics.median(a / b for a, b in both[1:]):.2f}")
    furthest = max(abs(x - y) / abs(x) for x, y in zip(live.losses, stored.losses, strict=True))
    print(f"losses differ by {furthest:.1e} of their size at most")
    print(f"parameters: {live.parameters:,} and {stored.parameters:,}")


if __name__ == "__main__":
    run()
