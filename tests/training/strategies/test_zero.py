"""What ZeRO refuses before anything is made."""

from __future__ import annotations

import pytest

from mmfusion.training.strategies.zero import ZeRO
from mmfusion.training.strategies.zero_config import refuse_unread


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"stage": 2, "offload": "nvme", "nvme_path": "/disks"}, "would take the host's memory"),
        ({"stage": 3, "offload": "nvme"}, "give a folder with nvme"),
        ({"stage": 3, "nvme_path": "/disks"}, "none without"),
        ({"stage": 2, "divide_encoders": True}, "divide_encoders is for stage 3"),
        ({"stage": 1, "divide_denoisers": True}, "divide_denoisers is for stage 3"),
        ({"stage": 3, "config": {"zero_optimization": {"stage": 2}}}, "give the stage as stage"),
        ({"stage": 2, "config": {"bf16": {"enabled": True}}}, "config.bf16 is enabled"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        ZeRO(**options)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"steps_per_pront": 5}, "steps_per_pront is no field.*Did you mean steps_per_print"),
        ({"comms_logger": {"enabled": "perhaps"}}, "does not take config"),
        ({"zero_optimization": {"reduce_buckets": 5}}, "reduce_buckets"),
        ({"sparse_attention": {}}, "has been removed"),
    ],
)
def test_fields_that_deepspeed_would_pass_over_are_refused(fields, told):
    with pytest.raises(ValueError, match=f"(?s){told}"):
        refuse_unread({"train_micro_batch_size_per_gpu": 1, **fields})


def test_deepspeeds_fields_are_taken():
    read = ZeRO(stage=2, offload="cpu", config={"wall_clock_breakdown": True}).config
    sections = {name: {} for name in ("comms_logger", "flops_profiler", "tensorboard", "compile")}
    refuse_unread({**read, **sections, "train_micro_batch_size_per_gpu": 1, "dump_state": False})


def test_the_configuration_may_be_a_file(tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text('{"wall_clock_breakdown": true, "zero_optimization": {"overlap_comm": false}}')
    config = ZeRO(stage=2, config=str(file)).config
    assert config["wall_clock_breakdown"] is True
    assert config["zero_optimization"]["overlap_comm"] is False
    assert config["zero_optimization"]["stage"] == 2
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        ZeRO(config=str(file))
    with pytest.raises(FileNotFoundError, match=r"none\.json is not a file"):
        ZeRO(config="none.json")
