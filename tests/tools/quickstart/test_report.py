import csv
import re

import pytest

from mmfusion.tools.quickstart.figures import print_figures, read_columns, rows, training_figures
from mmfusion.tools.quickstart.report import Shown, render, smooth
from mmfusion.types import Media

EVIL = "<script>alert('x')</script>"


def figure(value, bound=None):
    return {
        "value": value, "low": value - 0.1, "high": value + 0.1, "bound": bound,
        "reached": None if bound is None else value >= bound,
    }  # fmt: skip


@pytest.fixture
def figures():
    caption = {
        "samples": 10,
        "concepts": 9,
        "tokens": 50,
        "loss": {"right": figure(2.0), "strangers": figure(2.7), "blank": figure(3.0)},
        "gain": {"over strangers": figure(0.7, 0.6), "over blank": figure(1.0)},
        "gain by source": {},
        "choice": {EVIL: figure(0.4, 0.45)},
    }
    return {
        "captions": {"pictures": caption},
        "shapes": {
            "questions": 8, "pictures": 3, "exact match": figure(0.9, 0.8),
            "question only": figure(0.6), "majority": figure(0.4),
        },
        "training": {"stage 1": {"steps": 3, "throughput/tokens_per_s": 700.0}},
        "memory_gib": 2.5,
    }  # fmt: skip


@pytest.fixture
def page(assets, figures):
    media = {
        "image": Media("image", (assets / "pictures/bear.jpg").read_bytes(), "jpg"),
        "audio": Media("audio", (assets / "speech/bear.ogg").read_bytes(), "ogg"),
        "video": Media("video", (assets / "videos/bear.mp4").read_bytes(), "mp4"),
    }
    shown = [Shown("talks", (item,), EVIL, f"{EVIL}&", "<b>") for item in media.values()]
    curves = {"stage 1": [(0, 5.0), (1, 4.0), (2, 3.5)]}
    return render(EVIL, figures, {EVIL: 3.0}, curves, shown)


def test_everything_from_data_is_escaped(page):
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8


def test_page_needs_no_other_file(page):
    assert re.findall(r'src="(?!data:)', page) == []
    assert re.findall(r'<link|@import|href="http', page) == []
    assert set(re.findall(r'src="data:(\w+)/', page)) == {"image", "audio"}


def test_page_shows_figures_bounds_and_curves(page):
    assert "0.70 [0.60, 0.80] nats" in page
    assert "90.0 [80.0, 100.0] %" in page
    assert 'class="reached">0.6' in page
    assert 'class="missed">45 %' in page
    assert "<svg" in page
    assert "--with-baselines" in page


def test_curve_is_drawn_from_the_last_attempt_at_a_step(tmp_path):
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["trainer/global_step", "trainer/attempt", "train/loss", "throughput/x_peak"]
        )
        writer.writerows([[0, 1, 5.0, 1], [1, 1, 4.0, ""], [1, 2, 3.0, 4], [2, 2, "", 2]])
    columns = read_columns(tmp_path / "metrics.csv")
    assert columns["train/loss"] == [(0, 5.0), (1, 3.0)]
    assert training_figures(tmp_path) == {"steps": 2, "throughput/x_peak": 4.0}


def test_smoothing_starts_at_the_first_value():
    assert smooth([4.0, 4.0, 4.0]) == pytest.approx([4.0] * 3)
    assert smooth([4.0])[0] == 4.0
    assert smooth([0.0] * 50 + [1.0] * 100)[-1] > 0.99


def test_printed_table_says_which_bounds_are_missed(figures, capsys):
    print_figures(figures)
    out = capsys.readouterr().out
    assert out.count("NOT REACHED") == 1
    assert out.count(": reached") == 2
    assert len(out.splitlines()) == len(list(rows(figures))) + 1
