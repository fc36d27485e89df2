"""Useful tokens a second of packs laid end to end, against the same samples as padded rows.

    python -m tests.benchmarks.packing recipes/quickstart/1_align_input.yaml --steps 10

Both run the same forward and backward pass of the same model on the same samples, turn by turn.
Prints the median ratio; padding does not count as useful.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import torch

from mmfusion.training.rebuild import from_recipe
from mmfusion.types import Batch


def batches(recipe: str, overrides: list[str], pad_rows: bool) -> tuple[object, Iterator[Batch]]:
    """The model of a recipe and its training batches, packed or padded."""
    rows = f"--data.pad_rows={str(pad_rows).lower()}"
    module, data = from_recipe(recipe, [rows, "--data.num_workers=0", *overrides])
    data.attach(module.model.processor())
    return module, iter(data.train_dataloader())


def run() -> None:
    """Measure one recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=10)
    options, more = parser.parse_known_args()
    module, packed = batches(options.recipe, more, pad_rows=False)
    _, padded = batches(options.recipe, more, pad_rows=True)
    module.configure_model()
    module.train()
    rates: dict[str, list[float]] = {"packed": [], "padded": []}
    shares: dict[str, list[float]] = {"packed": [], "padded": []}
    for step in range(options.steps + 1):
        pair = [("packed", next(packed)), ("padded", next(padded))]
        for name, batch in pair if step % 2 else reversed(pair):  # the second finds warm caches
            begun = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                output = module.model(batch)
                losses = [loss(module.model, output, batch) for loss in module.objectives.values()]
            (torch.stack([loss.total for loss in losses]).sum() + output.idle).backward()
            seconds = time.perf_counter() - begun
            module.zero_grad(set_to_none=True)
            useful = batch.segment_ids >= 0
            if step:  # the first warms up
                rates[name].append(int(useful.sum()) / seconds)
                shares[name].append(float(useful.float().mean()))
    ratios = [a / b for a, b in zip(rates["packed"], rates["padded"], strict=True)]
    padding = {name: 1 - statistics.mean(values) for name, values in shares.items()}
    print(
        f"useful tokens/s, packed / padded: median {statistics.median(ratios):.2f} over "
        f"{len(ratios)} pairs; padding {padding['packed']:.1%} and {padding['padded']:.1%}"
    )


if __name__ == "__main__":
    run()
