"""Answered samples as files of the run directory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmfusion.training.callbacks import sample_pages
from mmfusion.training.callbacks.sample_pages import KEPT, SamplePages, write_page
from mmfusion.training.callbacks.table import Answered
from mmfusion.types import Media

PICTURE = Media("image", b"png", "png", caption="w1 & w2")
CLIP = Media("video", b"mp4", "mp4", start=0.5, end=2.0)
SOUND = Media("audio", b"wav", "../../x")
ROW = Answered("s", (CLIP,), "<b>draw</b>", "here", "", made=(PICTURE,), wanted=(SOUND, PICTURE))


def test_a_page_shows_prompt_truth_and_what_was_made(tmp_path: Path) -> None:
    page = write_page(tmp_path / "val-00000004", [ROW]).read_text()
    assert "&lt;b&gt;draw&lt;/b&gt;" in page
    assert '<img src="0000-made-0.png"' in page
    assert '<video controls src="0000-media-0.mp4#t=0.5,2.0">' in page
    assert '<audio controls src="0000-wanted-0.x">' in page
    assert page.count('<p class="tag">w1 &amp; w2</p>') == 2  # of both pictures
    assert "said aloud" not in page
    (line,) = (tmp_path / "val-00000004" / "samples.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["prompt"], row["answer"], row["truth"]) == ("<b>draw</b>", "here", "")
    made = {"modality": "image", "file": "0000-made-0.png", "span": "", "caption": "w1 & w2"}
    assert row["made"] == [{**made, "lacking": ""}]
    files = {path.name for path in (tmp_path / "val-00000004").iterdir()}
    assert files == {
        "index.html", "samples.jsonl", "0000-media-0.mp4", "0000-made-0.png", "0000-wanted-0.x",
        "0000-wanted-1.png",
    }  # fmt: skip


def test_a_page_tells_what_is_said_aloud(tmp_path: Path) -> None:
    row = replace(ROW, truth="there", truth_spoken=True)
    page = write_page(tmp_path / "page", [row]).read_text()
    assert page.count("said aloud") == 1
    assert '<p>there <span class="tag">(said aloud)</span></p>' in page
    assert "said aloud)" in write_page(tmp_path / "page", [replace(ROW, spoken=True)]).read_text()
    (line,) = (tmp_path / "page" / "samples.jsonl").read_text().splitlines()
    assert (json.loads(line)["spoken"], json.loads(line)["truth_spoken"]) == (True, False)


def test_a_page_tells_what_was_not_drawn(tmp_path: Path) -> None:
    page = write_page(tmp_path / "page", [replace(ROW, undrawn=("audio",))]).read_text()
    assert page.count("(audio, not drawn: validation.media_samples)") == 1
    (line,) = (tmp_path / "page" / "samples.jsonl").read_text().splitlines()
    assert json.loads(line)["undrawn"] == ["audio"]


def test_what_is_too_large_is_named_but_not_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sample_pages, "MAX_BYTES", 2)
    page = write_page(tmp_path / "page", [ROW]).read_text()
    assert "video (not kept: too large)" in page
    assert {path.suffix for path in (tmp_path / "page").iterdir()} == {".html", ".jsonl"}


def test_what_features_took_the_place_of_is_said_to_be_so(tmp_path: Path) -> None:
    gone = replace(PICTURE, data=b"", stored=b"features")
    page = write_page(tmp_path / "page", [replace(ROW, wanted=(gone,))]).read_text()
    assert "image (not kept: features took its place)" in page
    assert page.count("<img") == 1  # of the one that was made
    assert all(path.stat().st_size for path in (tmp_path / "page").iterdir())


def test_the_last_validations_stay_and_a_step_that_comes_again_is_replaced(tmp_path: Path) -> None:
    pages = SamplePages(tmp_path, "val")
    for step in (*range(KEPT + 3), KEPT + 2):
        page = pages.write([ROW] * (step + 1), step)
        assert page.read_text().count("&lt;b&gt;draw") == step + 1
    kept = [f"val-{step:08d}" for step in range(3, KEPT + 3)]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == kept


def test_the_page_of_an_older_checkpoint_stays_beside_the_newest(tmp_path: Path) -> None:
    for step in (*range(1, KEPT + 1), 0):
        page = SamplePages(tmp_path, "validate", step).write([ROW], trainer_step=99)
    assert page == tmp_path / "samples" / "validate-00000000" / "index.html"
    assert page.is_file()
    assert not (tmp_path / "samples" / "validate-00000099").exists()
