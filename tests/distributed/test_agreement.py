"""What ranks tell one another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from mmfusion.training.agreement import gather, gather_to_first
from tests.training import jobs

pytestmark = pytest.mark.slow


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = [f"{rank}{letter}" for letter in "ab"[: rank + 1]]
    told = {"all": gather(own), "first": gather_to_first(own)}
    Path(folder, f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def test_what_is_gathered_to_the_first_rank_is_on_no_other(tmp_path: Path) -> None:
    ranks = [jobs.CONTEXT.Process(target=_rank, args=(i, str(tmp_path))) for i in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1))
    assert first["all"] == second["all"] == first["first"] == ["0a", "1a", "1b"]
    assert second["first"] == []
