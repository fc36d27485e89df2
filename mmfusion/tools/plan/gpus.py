"""GPUs by name: memory, and operations a second in bfloat16 without sparsity."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

GB, TERA = 10**9, 10**12


@dataclass(frozen=True)
class GPU:
    """One GPU.

    Attributes:
        name: of the table, or as given.
        memory: bytes, by the data sheet. Drivers show up to 7 % more where a GB is 2^30 bytes; what
            they keep for themselves (context, ECC) is about as much.
        flops: a second at most, dense matrix products in bfloat16 with sums in fp32.
    """

    name: str
    memory: int
    flops: float


def _gpu(name: str, memory: int, teraflops: float) -> GPU:
    return GPU(name, memory * GB, teraflops * TERA)


# Data sheets with two figures give the one without sparsity here.
GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA H100 Tensor Core GPU data sheet, SXM: 80GB, BFLOAT16 1,979 with sparsity
        _gpu("H100-80GB", 80, 989.4),
        # NVIDIA H200 Tensor Core GPU data sheet, SXM: 141GB, BFLOAT16 1,979 with sparsity
        _gpu("H200-141GB", 141, 989.4),
        # NVIDIA A100 Tensor Core GPU data sheet: 40GB and 80GB, BFLOAT16 312 | 624*
        _gpu("A100-40GB", 40, 312),
        _gpu("A100-80GB", 80, 312),
        # NVIDIA L40S data sheet: 48GB, BFLOAT16 362.05 | 733*
        _gpu("L40S-48GB", 48, 362.05),
        # NVIDIA A10 data sheet: 24GB, BFLOAT16 125 | 250*
        _gpu("A10-24GB", 24, 125),
        # NVIDIA L4 data sheet: 24GB, BFLOAT16 242 with sparsity
        _gpu("L4-24GB", 24, 121),
        # NVIDIA V100 data sheet, SXM2: 32GB, "deep learning" 125, in fp16: it has no bfloat16
        _gpu("V100-32GB", 32, 125),
        # NVIDIA HGX B200 data sheet, one of its GPUs: 180GB, FP16/BF16 4.5 petaflops with sparsity
        _gpu("B200-180GB", 180, 2250),
        # AMD Instinct MI300X data sheet: 192GB, bfloat16 1,307.4
        _gpu("MI300X-192GB", 192, 1307.4),
        # NVIDIA Ada GPU architecture white paper, table of the RTX 4090: 24GB, BF16 with FP32
        # accumulate 165.2 | 330.4*
        _gpu("RTX4090-24GB", 24, 165.2),
    )
}
_OWN = re.compile(r"(\d+(?:\.\d+)?)GB@(\d+(?:\.\d+)?)TFLOPS", re.I)


def gpu_of(given: str) -> GPU:
    """A GPU of the table, or of ``80GB@989TFLOPS``.

    Raises:
        ValueError: for anything else.
    """
    if gpu := GPUS.get(given):
        return gpu
    match = _OWN.fullmatch(given)
    if match and float(match[1]) and float(match[2]):
        return GPU(given, round(float(match[1]) * GB), float(match[2]) * TERA)
    near = difflib.get_close_matches(given.upper(), GPUS, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"--gpu is {given!r}; expected one of {', '.join(GPUS)}, or memory and speed as "
        f"80GB@989TFLOPS.{hint}"
    )
