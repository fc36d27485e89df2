"""What ZeRO refuses before anything is made."""

from __future__ import annotations

import pytest

from mmfusion.training.strategies.zero import ZeRO


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"stage": 2, "offload": "nvme", "nvme_path": "/disks"}, "would take the host's memory"),
        ({"stage": 3, "offload": "nvme"}, "give a folder with nvme"),
        ({"stage": 3, "nvme_path": "/disks"}, "none without"),
        ({"stage": 2, "divide_encoders": True}, "divide_encoders is for stage 3"),
        ({"stage": 3, "config": {"zero_optimization": {"stage": 2}}}, "give the stage as stage"),
        ({"stage": 2, "config": {"bf16": {"enabled": True}}}, "config.bf16 is enabled"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        ZeRO(**options)
