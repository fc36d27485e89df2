"""A linear layer in bfloat16 against the same in float32, turn by turn, on this CPU.

    python -m tests.benchmarks.bfloat16

Rows and widths are those of a step of the quickstart's LLM. Prints whether mmfusion takes the CPU
for one that computes bfloat16, and the medians of the ratios of forward and backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from mmfusion.models.bfloat16 import computes_bfloat16


def seconds(layer: nn.Linear, rows_NI: torch.Tensor) -> float:
    """Of one pass forth and back, of the input's gradient only, as of a frozen layer."""
    rows_NI = rows_NI.detach().requires_grad_()
    begun = time.perf_counter()
    layer(rows_NI).sum().backward()
    return time.perf_counter() - begun


def run() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=880)
    parser.add_argument("--pairs", type=int, default=11)
    options = parser.parse_args()
    print(f"computes bfloat16: {computes_bfloat16('cpu')}")
    for wide, narrow in ((576, 1536), (1536, 576)):
        layers = {
            kind: nn.Linear(wide, narrow, bias=False, dtype=kind).requires_grad_(False)
            for kind in (torch.float32, torch.bfloat16)
        }
        pairs = []
        for _ in range(options.pairs + 1):
            full, half = (
                seconds(layer, torch.randn(options.rows, wide, dtype=kind))
                for kind, layer in layers.items()
            )
            pairs.append((full, half))
        pairs = pairs[1:]  # the first makes kernels
        ratio = statistics.median(half / full for full, half in pairs)
        full, half = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(
            f"{wide} -> {narrow}, bfloat16 / float32: median {ratio:.2f} over {len(pairs)} pairs; "
            f"medians {half * 1e3:.1f} and {full * 1e3:.1f} ms"
        )


if __name__ == "__main__":
    run()
