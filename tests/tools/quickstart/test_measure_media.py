"""Figures of answers that are made up, where it is clear what they must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmfusion.inference import Answer, load
from mmfusion.metrics.judges.classifier import ClassifierJudge
from mmfusion.tools.quickstart import measure_media
from mmfusion.tools.quickstart.heldout import HeldOut
from mmfusion.tools.quickstart.measure_media import (
    Said,
    denoising_figures,
    drop_figures,
    emission_figure,
    right_figures,
)
from mmfusion.tools.quickstart.media_figures import rows, shown
from mmfusion.training.rebuild import from_recipe
from mmfusion.types import Media, Message, Sample, Text
from tests.training.pictures import prepare, recipe
from tests.training.tiny import fit


class Reader(ClassifierJudge):
    """Reads what a medium shows from its bytes."""

    def __init__(self) -> None:
        super().__init__(["what"])

    def labels(self, wanted: Media) -> dict[str, str] | None:
        return {"what": wanted.caption or ""}

    def classify(self, media: Sequence[Media]) -> list[Mapping[str, str]]:
        return [{"what": medium.data.decode()} for medium in media]


def said(wanted: str, *made: tuple[str, str], concept: str = "c") -> Said:
    """An answer with media (modality, what they show) to a request of a modality for "x"."""
    about: dict[str, Any] = {"concept": concept, "source": f"asks-{wanted}", "modality": wanted}
    target = [Media(wanted, b"", "png", caption="x")] if wanted else [Text("words")]
    turns = (Message("user", (Text("ask"),)), Message("assistant", tuple(target)))
    parts = [Text("Here."), *(Media(modality, what.encode(), "png") for modality, what in made)]
    return Said(HeldOut(Sample(turns), about), Answer(parts))


@pytest.mark.slow
def test_denoising_figures_of_a_run_do_not_depend_on_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fit(recipe(prepare(tmp_path), trainer__max_steps=2))
    source = from_recipe(str(run.path / "config.yaml"))[1].sources["pairs"]
    items = [
        HeldOut(source[i], {"concept": str(i), "source": "pairs", "modality": "image"})
        for i in range(5)
    ]
    found = []
    for together in (5, 2):
        monkeypatch.setattr(measure_media, "TOGETHER", together)
        figures = denoising_figures(load(run.path), items, "image")
        found.append({name: figure.value for name, figure in figures.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert len({round(found[0][name], 4) for name in ("ours", "caption", "empty")}) == 3
    monkeypatch.setattr(measure_media, "NOISES", 1)
    once = denoising_figures(load(run.path), items, "image")
    assert once["ours"].value != pytest.approx(found[0]["ours"], rel=1e-3)  # another mean


def test_an_answer_is_right_by_its_first_medium_of_the_modality() -> None:
    judges: Any = {"image": Reader(), "audio": Reader()}
    found = right_figures(
        [
            said("image", ("image", "x")),
            said("image", ("audio", "x"), ("image", "x"), ("image", "y")),
            said("image", ("image", "y")),
            said("image"),
            said("audio", ("image", "x")),
            said(""),
        ],
        judges,
        {"image": 0.4},
    )
    assert found["image"].value == 0.5
    assert found["image"].reached
    assert found["audio"].value == 0.0
    assert found["audio"].bound is None


def test_emission_counts_modalities_that_are_missed_or_surplus() -> None:
    right = [said("image", ("image", "x")), said("")]
    assert emission_figure(right).value == 1.0
    # One of two wanted is made, and one is made where words were wanted: 2 * 1 / (2 + 1 + 1).
    some = [said("image", ("image", "x")), said("audio"), said("", ("image", "x"))]
    assert emission_figure(some).value == pytest.approx(0.5)
    wrong = [said("audio", ("image", "x"))]
    assert emission_figure(wrong).value == 0.0


def test_the_change_is_over_the_same_questions() -> None:
    concepts = ["a", "b", "c", "d"]
    before = {"shapes": (concepts, np.array([1.0, 1.0, 0.0, 0.0]))}
    after = {"shapes": (concepts, np.array([1.0, 0.0, 0.0, 0.0]))}
    found = drop_figures(before, after)["shapes"]
    assert (found["before"].value, found["after"].value) == (0.5, 0.25)
    assert found["change"].value == -0.25
    assert not found["change"].reached


def test_the_table_has_a_line_for_each_figure() -> None:
    one = {"value": 0.5, "low": 0.4, "high": 0.6, "bound": None, "reached": None}
    each = dict.fromkeys(("image", "audio", "video"), one)
    figures = {
        "right": each, "judges": each, "remade": {"image": one}, "emission": one,
        "denoising": {m: dict.fromkeys(("ours", "caption", "empty", "gain"), one) for m in each},
        "understanding": dict.fromkeys(
            ("shapes", "stamps", "motions"), dict.fromkeys(("before", "after", "change"), one)
        ),
    }  # fmt: skip
    table = list(rows(figures))
    assert len(table) == len({what for what, _, _ in table}) == 6 + 1 + 1 + 12 + 9


def test_the_page_shows_question_answer_and_truth() -> None:
    (found,) = shown([said("image", ("image", "y"))])
    assert (found.question, found.answer) == ("ask", "Here.")
    assert [medium.data for medium in found.made] == [b"y"]
    assert [medium.caption for medium in found.wanted] == ["x"]
