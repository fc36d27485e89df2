"""Where bfloat16 is no gain: CPUs that have no instructions for it."""

from __future__ import annotations

import torch

HALF = (torch.bfloat16, torch.float16)


def computes_bfloat16(device: torch.device | str | None = None) -> bool:
    """Whether bfloat16 is about as fast as float32, or faster.

    A CPU needs AVX-512 (or Arm's bf16): without, PyTorch multiplies matrices of bfloat16 in plain
    loops, up to a hundred times more slowly than those of float32.

    Args:
        device: where; None is a GPU where there is one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type != "cpu":
        return True
    return bool(
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
