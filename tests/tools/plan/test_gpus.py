"""GPUs are found by name, or told by their memory and speed."""

import pytest

from mmfusion.tools.plan.gpus import GPU, GPUS, gpu_of


def test_a_name_gives_the_data_sheet():
    assert gpu_of("H100-80GB") == GPU("H100-80GB", 80 * 10**9, 989.4e12)
    assert gpu_of("L4-24GB").flops == 121e12  # half of what the data sheet says with sparsity


def test_every_name_says_the_memory():
    for name, gpu in GPUS.items():
        assert name.endswith(f"-{gpu.memory // 10**9}GB")


def test_memory_and_speed_may_be_given():
    assert gpu_of("80GB@989TFLOPS") == GPU("80GB@989TFLOPS", 80 * 10**9, 989e12)
    assert gpu_of("12.5gb@0.5tflops").memory == 12_500_000_000


@pytest.mark.parametrize("given", ["H100", "80GB", "0GB@10TFLOPS", "80GB@989", ""])
def test_anything_else_is_refused(given):
    with pytest.raises(ValueError, match=r"--gpu is .*expected one of H100-80GB, .*80GB@989TFLOPS"):
        gpu_of(given)


def test_a_near_name_is_suggested():
    with pytest.raises(ValueError, match=r"Did you mean H100-80GB\?"):
        gpu_of("h100-80g")
