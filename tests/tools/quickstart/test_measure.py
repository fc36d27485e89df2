"""The arithmetic of the figures, with a reader whose losses are known."""

import numpy as np
import pytest
import torch

from mmfusion.tools.quickstart.heldout import HeldOut, text_of
from mmfusion.tools.quickstart.measure import (
    OPTIONS,
    _remembering,
    caption_figures,
    choice_figures,
    motion_figures,
    normal,
)
from mmfusion.tools.quickstart.pictures import MOTIONS
from mmfusion.types import Media, Message, Sample, Text


class KnownLosses:
    """Scores captions by a rule: ``right`` nats a word where the media's bytes are the caption,
    ``wrong`` where they are another's, ``blank`` where they are none of ours.
    """

    def __init__(self, right=1.0, wrong=3.0, blank=2.0, guess=None):
        self.right, self.wrong, self.blank, self.guess = right, wrong, blank, guess

    def score(self, samples, tokens_per_batch=4096):
        sums, counts = [], []
        for sample in samples:
            caption, media = text_of(sample.messages[-1]), sample.media[0].data
            words = len(caption.split())
            each = self.right if media.decode(errors="replace") == caption else self.wrong
            if not media.startswith(b"thing"):
                each = self.blank
            sums.append(each * words)
            counts.append(words)
        return torch.tensor(sums, dtype=torch.float64), torch.tensor(counts)


def item(n: int, caption: str, source: str = "stamps", **about) -> HeldOut:
    sample = Sample(
        (
            Message("user", (Media("image", caption.encode(), "jpg"), Text("?"))),
            Message("assistant", (Text(f" {caption}\n"),)),
        ),
        key=f"k{n}",
    )
    return HeldOut(sample, {"concept": caption, "source": source, **about})


ITEMS = [item(n, f"thing {n} " + "word " * (n % 4) + "end") for n in range(20)]


def test_gains_are_differences_of_losses_per_token():
    found = caption_figures(KnownLosses(1.0, 3.0, 2.0), KnownLosses(1.5, 1.5), ITEMS, 0.3, 0.6)
    losses = {name: estimate.value for name, estimate in found["loss"].items()}
    assert losses == pytest.approx(
        {"right": 1.0, "strangers": 3.0, "blank": 2.0, "no-media run": 1.5}
    )
    gains = {name: estimate.value for name, estimate in found["gain"].items()}
    assert gains == pytest.approx(
        {"over strangers": 2.0, "over blank": 1.0, "over no-media run": 0.5}
    )
    assert found["gain"]["over no-media run"].bound == 0.3
    assert found["gain"]["over strangers"].bound == 0.6
    assert found["tokens"] == sum(len(i.answer.split()) for i in ITEMS)


def test_without_a_no_media_run_its_gain_is_not_claimed():
    found = caption_figures(KnownLosses(), None, ITEMS, 0.3, 0.6)
    assert "over no-media run" not in found["gain"]


def test_a_source_of_one_concept_is_measured_without_strangers():
    found = caption_figures(KnownLosses(), None, [item(0, "thing a")], 0.3, 0.6)
    assert "over strangers" not in found["gain"]
    assert found["loss"]["right"].value == 1.0


def test_a_model_that_looks_always_prefers_the_right_caption():
    assert choice_figures(KnownLosses(), ITEMS)["stamps"].value == 1.0
    assert choice_figures(KnownLosses(), ITEMS)["stamps"].bound == 0.45


def test_a_model_that_is_misled_never_prefers_it():
    assert choice_figures(KnownLosses(right=3.0, wrong=1.0), ITEMS)["stamps"].value == 0.0


def test_too_few_captions_to_choose_among_give_no_figure():
    assert choice_figures(KnownLosses(), ITEMS[: OPTIONS - 1]) == {}


def test_right_motion_is_counted():
    clips = [
        item(n, f"thing {n} {MOTIONS[name]}.", "motions", motion=name)
        for n, name in enumerate(sorted(MOTIONS))
    ]
    assert motion_figures(KnownLosses(), clips).value == 1.0
    assert motion_figures(KnownLosses(right=4.0), clips).value == 0.0


def test_an_encoder_is_asked_once_for_an_item():
    asked = []

    def forward(tensors):
        asked.append(len(tensors["x"]))
        return tensors["x"].float()[:, None] * 2

    remembered = _remembering(forward)
    x = torch.arange(12, dtype=torch.int16).view(4, 3)
    first = remembered({"x": x[:3]})
    again = remembered({"x": x[[2, 3, 0]]})
    assert asked == [3, 1]
    assert torch.equal(first, x[:3].float()[:, None] * 2)
    assert torch.equal(again, x[[2, 3, 0]].float()[:, None] * 2)


def test_answers_are_compared_without_case_and_full_stop():
    assert [normal(answer) for answer in (" Yes. ", "yes", "YES")] == ["yes"] * 3
    assert normal("no") != normal("not")
    assert np.mean([normal("A") == "a"]) == 1
