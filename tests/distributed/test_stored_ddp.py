"""Two processes over gloo train on stored features as one does on live parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmfusion.cli import main
from tests.distributed.test_media_ddp import run
from tests.training.pictures import prepare, recipe
from tests.training.tiny import steps

pytestmark = pytest.mark.slow


def test_two_ranks_on_stored_encodings_lose_what_one_does_live(tmp_path: Path) -> None:
    home = prepare(tmp_path)
    settings = {"trainer__max_steps": 6, "data__pack_tokens": 24}
    live = recipe(home, **settings)
    main(["data", "encode", str(live), "--out", str(home / "f"), "--media=instead"])
    stored = recipe(home, **settings, data__features=str(home / "f"))
    one, two = (run(home, *case) for case in (("one", 1, 2, live), ("two", 2, 1, stored)))
    assert len(one) == 6
    assert two[0] == pytest.approx(one[0], rel=1e-6)  # of the same weights
    for alone, together in zip(one, two, strict=True):  # AdamW makes more of what was rounded
        assert together == pytest.approx(alone, rel=1e-5)
    assert sorted_packs(home / "one-packs") == sorted_packs(home / "two-packs")


def sorted_packs(folder: Path) -> list[list[object]]:
    return [sorted(map(tuple, samples)) for samples, _ in steps(folder).values()]
