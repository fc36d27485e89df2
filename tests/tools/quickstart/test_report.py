import csv
import re
from pathlib import Path

import numpy as np
import pytest

from mmfusion.tools.quickstart.figures import (
    BOUNDS_OF_SMALL,
    print_figures,
    read_columns,
    rows,
    training_figures,
)
from mmfusion.tools.quickstart.report import Shown, draw_curves, render, smooth, validations
from mmfusion.training.callbacks.sample_pages import write_page
from mmfusion.training.callbacks.table import Answered
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
        "checkpoints": {"small": False},
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
    return render(Path("runs") / EVIL, figures, {EVIL: 3.0}, curves, shown)


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


def test_page_says_how_to_go_on_and_that_a_small_run_misses_the_bounds(page, figures):
    assert BOUNDS_OF_SMALL not in page
    figures["checkpoints"]["small"] = True
    small = render(Path("runs/my run"), figures, {}, {}, [])
    assert BOUNDS_OF_SMALL.replace("'", "&#39;") in small
    assert 'class="small">45 %' in small
    assert 'class="missed"' not in small
    assert "mmfusion chat &#39;runs/my run&#39;" in small


def test_curves_have_a_legend_and_whole_steps():
    drawn = draw_curves({"stage 3": [(0, 3.0), (1, 2.0), (2, 1.5)]})
    assert "<!-- smoothed -->" in drawn
    assert "<!-- 0 -->" in drawn
    assert "<!-- 0.5 -->" not in drawn.partition("<!-- step -->")[0]


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


def test_smoothing_does_not_lag_behind_a_falling_loss():
    assert smooth([]) == []
    assert smooth([4.0]) == [4.0]
    assert smooth([4.0, 4.0, 4.0]) == pytest.approx([4.0] * 3)
    falling = np.linspace(9.0, 1.0, 81)
    assert smooth(falling)[20:60] == pytest.approx(falling[20:60])
    noise = np.random.default_rng(0).standard_normal(500)
    assert np.std(smooth(noise)) < 0.4


def test_printed_table_says_which_bounds_are_missed(figures, capsys):
    print_figures(figures)
    out = capsys.readouterr().out
    assert out.count("NOT REACHED") == 1
    assert out.count(": reached") == 2
    assert len(out.splitlines()) == len(list(rows(figures))) + 1
    figures["checkpoints"]["small"] = True  # whose bounds they are not
    print_figures(figures)
    out = capsys.readouterr().out
    assert "NOT REACHED" not in out
    assert out.count("at least") == 3


def test_printed_columns_are_below_each_other_whatever_the_names(figures, capsys):
    figures["captions"]["pictures"]["choice"]["a very " + "long " * 20 + "name"] = figure(0.4, 0.3)
    print_figures(figures)
    table = capsys.readouterr().out.splitlines()[:-1]
    assert len({line.index(" [") for line in table}) == 1
    assert len({line.index("at least") for line in table if "at least" in line}) == 1


def test_what_validations_made_is_on_the_page_beside_the_truth(tmp_path, assets, figures):
    picture = Media("image", (assets / "pictures/bear.jpg").read_bytes(), "jpg")
    clip = Media("video", (assets / "videos/bear.mp4").read_bytes(), "mp4")
    rows = [
        Answered("draw", (), EVIL, "", "", made=(picture, clip), wanted=(clip,)),
        Answered("draw", (), "w2", "w3", "", wanted=(picture,)),
        Answered("talk", (picture,), "w4", "w5", "w6"),
    ]
    for step in (4, 8):
        write_page(tmp_path / "samples" / f"val-{step:08d}", rows)
    found = validations(tmp_path)
    assert list(found) == ["step 4", "step 8"]
    first, second = found["step 8"]  # words alone are shown above
    assert [media.data for media in first.made] == [picture.data, clip.data]
    assert [media.modality for media in second.wanted] == ["image"]
    page = render(tmp_path, figures, {}, {"stage 1": [(0, 5.0)]}, [], found)
    assert page.count('<video controls src="data:video/mp4;base64,') == 4
    assert page.count('<img src="data:image/jpeg') == 4
    assert "<script" not in page
    assert re.findall(r'src="(?!data:)', page) == []
    assert validations(tmp_path / "absent") == {}
