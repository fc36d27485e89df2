"""Two processes over gloo make pictures as one does, in any number of micro-batches, also where a
rank has none to make.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from mmfusion.training.loggers import read_metrics
from tests.training import jobs
from tests.training.pictures import FULL, NEW, aligned_rows, objective, prepare, recipe
from tests.training.tiny import recorded

HEALTH = "tests.training.callbacks.test_media_health"
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
    args = ["fit", "-c", str(path), f"--run_dir={home}/{name}", "--timeout_minutes=1"]
    args += [f"--trainer.callbacks=[{recorder}]", f"--data.packs_per_micro_batch={packs}"]
    if world == 2:
        args += ["--trainer.strategy=ddp", "--trainer.devices=2"]
        codes = jobs.run_ranks(args, home / f"{name}.log", 2)
    else:
        codes = [jobs.run(args, home / f"{name}.log")]
    assert set(codes) == {0}, "".join(p.read_text() for p in home.glob(f"{name}*.[01l]*"))
    with (home / name / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    return [{key: float(row[key]) for key in NAMES if row.get(key)} for row in rows]


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
    assert lacking(home / "two-packs")


def lacking(folder: Path) -> set[int]:
    """Steps in which one rank has no picture to make, and the other has some."""
    pictures = {(row["step"], row["rank"]): 0 for row in recorded(folder)}
    for row in recorded(folder):
        pictures[row["step"], row["rank"]] += sum(s[0] == "pairs" for s in row["samples"])
    return {step for step, _ in pictures if bool(pictures[step, 0]) != bool(pictures[step, 1])}


def test_a_rank_without_pictures_reaches_the_llm_without_next_token_too(home: Path) -> None:
    path = aligned_rows(home)
    alone, two = run(home, "align-one", 1, 1, path), run(home, "align-two", 2, 1, path)
    assert lacking(home / "align-two-packs")
    assert len(alone) > 3  # steps with a picture
    for one, together in zip(alone, two, strict=True):
        assert together == pytest.approx(one, abs=1e-5)


def test_two_ranks_find_the_figures_of_one(home: Path) -> None:
    """Also where ranks have other numbers of answers and targets; media included."""
    sources = yaml.safe_load(recipe(home).read_text())["data"]["sources"]
    found = []
    for world in (1, 2):
        path = recipe(
            home,
            run_dir=f"{home}/figures{world}",
            trainer__max_steps=6,
            model__tuning={
                "output_projectors": FULL,
                "llm": {**NEW, "init_args": {"lr": 0.3}},  # soon answers with pictures
            },
            val_every_n_steps=6,
            data__pack_tokens=24,
            data__val_sources=sources,
            data__val_limit=13,
            validation={
                "generate_samples": 7,
                "media_samples": 5,
                "table_samples": 3,
                "max_new_tokens": 3,
                "sampling": {"steps": 2},
                "judges": {"image": {"class_path": f"{HEALTH}.Bright"}},
            },
        )
        args = ["fit", "-c", str(path)]
        if world == 2:
            args += ["--trainer.strategy=ddp", "--trainer.devices=2"]
            codes = jobs.run_ranks(args, home / f"figures{world}.log", 2)
        else:
            codes = [jobs.run(args, home / f"figures{world}.log")]
        assert set(codes) == {0}, "".join(p.read_text() for p in home.glob("figures*.[01l]*"))
        run = home / f"figures{world}"
        (row,) = [row for row in read_metrics(run / "metrics.csv") if "val/loss" in row]
        shown = (run / "samples" / "val-00000006" / "samples.jsonl").read_text()
        found.append(({key: x for key, x in row.items() if key.startswith("val/")}, shown))
    (one, shown_one), (two, shown_two) = found
    assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
    assert len(one) > 15
    assert "val/judge/image/right/light" in one
    assert shown_two == shown_one
