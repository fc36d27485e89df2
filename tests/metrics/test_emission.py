"""Precision and recall of answering with media, counted by hand."""

from __future__ import annotations

import pytest

from mmfusion.metrics.emission import Emission

GIVEN = [{"image"}, set(), {"image", "audio"}, {"image"}, set(), {"audio"}]
WANTED = [{"image"}, {"image"}, {"image"}, set(), set(), set()]


def test_figures_are_the_counted_ones_however_the_answers_are_split() -> None:
    whole, parts = Emission(["image", "audio", "video"]), Emission(["image", "audio", "video"])
    whole.update(GIVEN, WANTED)
    for given, wanted in zip(GIVEN, WANTED, strict=True):
        parts.update([given], [wanted])
    found = whole.compute()
    assert found == parts.compute()
    assert found == {
        "precision/image": pytest.approx(2 / 3),
        "recall/image": pytest.approx(2 / 3),
        "f1/image": pytest.approx(2 / 3),
        "precision/audio": 0.0,  # given twice, never wanted
        "f1/audio": 0.0,
    }


def test_a_model_that_never_answers_with_media_has_no_recall_and_no_precision() -> None:
    emission = Emission(["image"])
    emission.update([set(), set()], [{"image"}, set()])
    assert emission.compute() == {"recall/image": 0.0, "f1/image": 0.0}
