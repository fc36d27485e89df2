"""Two processes over gloo make pictures as one does, in any number of micro-batches, also where a
rank has none to make.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.training import jobs
from tests.training.pictures import objective, prepare, recipe
from tests.training.tiny import recorded

pytestmark = pytest.mark.slow
NAMES = ("train/loss", "train/next_token", "train/align", "train/denoise")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("media_ddp"))


def run(home: Path, name: str, world: int, packs: int, path: Path) -> list[dict[str, float]]:
    """Losses of each step of four packs, in micro-batches of ``packs``."""
    recorder = {
        "class_path": "tests.training.tiny.Recorder",
        "init_args": {"folder": f"{home}/{name}-packs"},
    }
    args = ["fit", "-c", str(path), f"--run_dir={home}/{name}"]
    args += [f"--trainer.callbacks=[{recorder}]", f"--data.packs_per_micro_batch={packs}"]
    if world == 2:
        args += ["--trainer.strategy=ddp", "--trainer.devices=2"]
        codes = jobs.run_ranks(args, home / f"{name}.log", 2)
    else:
        codes = [jobs.run(args, home / f"{name}.log")]
    assert set(codes) == {0}, "".join(p.read_text() for p in home.glob(f"{name}*.[01l]*"))
    with (home / name / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    return [{key: float(row[key]) for key in NAMES if row[key]} for row in rows]


def test_a_rank_without_pictures_to_make_changes_nothing(home: Path) -> None:
    objectives = {
        "next_token": {"class_path": "mmfusion.objectives.next_token.NextToken"},
        "align": objective("align", contrastive=0.5),
        "denoise": objective("denoise"),
    }
    path = recipe(home, trainer__max_steps=8, model__objectives=objectives, data__pack_tokens=24)
    whole, four = (run(home, name, 1, packs, path) for name, packs in (("whole", 4), ("four", 1)))
    two = run(home, "two", 2, 1, path)
    assert len(whole) == 8
    for one, alone, together in zip(whole, four, two, strict=True):
        assert alone == pytest.approx(one, abs=1e-5)
        assert together == pytest.approx(one, abs=1e-5)
    pictures = {(row["step"], row["rank"]): 0 for row in recorded(home / "two-packs")}
    for row in recorded(home / "two-packs"):
        pictures[row["step"], row["rank"]] += sum(s[0] == "pairs" for s in row["samples"])
    lacking = {step for (step, _), count in pictures.items() if not count}
    assert any(sum(pictures[step, rank] for rank in (0, 1)) for step in lacking)
