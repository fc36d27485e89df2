"""Which CPUs compute bfloat16."""

import platform
from pathlib import Path

import pytest

from mmfusion.models.bfloat16 import computes_bfloat16


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the flags of an x86 CPU")
def test_a_cpu_computes_bfloat16_where_it_has_avx512():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    wide = {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags
    assert computes_bfloat16("cpu") == (wide or "avx_vnni_int8" in flags)


def test_other_devices_do():
    assert computes_bfloat16("cuda")
