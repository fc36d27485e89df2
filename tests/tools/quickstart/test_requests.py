"""Conversations in which media are asked for, as the converter reads them."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from mmfusion.tools.quickstart.pictures import MOTIONS
from mmfusion.tools.quickstart.questions import QUESTIONS
from mmfusion.tools.quickstart.requests import NEW_REQUESTS, REQUESTS, remakes, requests
from mmfusion.types import Media, Text
from tests.tools.quickstart.thing_samples import clips, sample, shapes, thing

NEUTRAL = set(
    "a an the of for in on it its this that i me we us to is can could may please".split()  # noqa: SIM905
)
"""Words that do not ask."""


def asking_words(templates: tuple[str, ...]) -> set[str]:
    found = re.findall(r"[a-z]+", " ".join(templates).lower().replace("{thing}", ""))
    return set(found) - NEUTRAL


@pytest.mark.parametrize("modality", REQUESTS)
def test_each_measured_request_asks_by_a_word_that_was_not_trained(modality: str) -> None:
    trained = set().union(*(asking_words(ways) for ways in REQUESTS.values()))
    for questions in QUESTIONS.values():
        trained |= asking_words(tuple(question for question, _ in questions))
    for entry in remakes([*shapes(), *clips()], ways=9):
        asked = sample(entry).messages[0].content
        texts = [part.text for part in asked if isinstance(part, Text)]
        trained |= asking_words(tuple(texts))
    assert all(way.count("{thing}") == 1 for way in (*REQUESTS[modality], *NEW_REQUESTS[modality]))
    for way in NEW_REQUESTS[modality]:
        assert asking_words((way,)) - trained, f"{way!r} asks in trained words only"


def test_a_request_is_answered_by_its_medium_with_its_caption() -> None:
    made = [*requests([*shapes(), *clips(), thing("Ocean waves.", "audio")])]
    assert len({entry.key for entry in made}) == len(made)
    for entry in made:
        found = sample(entry)
        (target,) = found.targets
        about = json.loads(entry.record["json"])
        assert (target.modality, target.caption) == (about["modality"], about["caption"])
        assert not found.media
        asked = found.messages[0].content[0]
        assert isinstance(asked, Text)
        assert target.caption.rstrip(".")[1:] in asked.text
    spoken = Counter(isinstance(sample(entry).messages[1].content[0], Text) for entry in made)
    assert min(spoken[True], spoken[False]) > len(made) // 5


def test_held_out_things_are_asked_for_in_new_words() -> None:
    (entry,) = requests([thing("A red circle.", "image", "val")])
    asked = sample(entry).messages[0].content[0]
    assert isinstance(asked, Text)
    assert asked.text in [way.format(thing="a red circle") for way in NEW_REQUESTS["image"]]


def test_what_is_trained_is_asked_for_in_several_ways_where_that_is_wished() -> None:
    made = [*requests([*shapes()[:3], thing("A red circle.", "image", "val")], ways=4)]
    assert Counter(
        json.loads(entry.record["json"])["caption"] for entry in made if entry.split == "train"
    ) == dict.fromkeys([one.caption for one in shapes()[:3]], 4)
    assert len(made) == 3 * 4 + 1
    texts = [str(sample(entry).messages[0].content[0]) for entry in made]
    assert len(set(texts)) == len({entry.key for entry in made}) == len(made)
    remade = [*remakes(clips(), ways=2)]
    asked = {(entry.key, sample(entry).targets[0].caption) for entry in remade}
    assert len(asked) == len({key for key, _ in asked}) == len(remade) > len(clips())


def test_a_remake_keeps_the_shape_or_the_subject() -> None:
    made = [sample(entry) for entry in remakes([*shapes(), *clips(), *shapes("val")])]
    assert len(made) == len([*shapes(), *clips(), *shapes("val")])
    for found in made:
        (given,), (wanted,) = found.media, found.targets
        assert isinstance(given, Media)
        old, new = given.data.decode(), (wanted.caption or "").rstrip(".")
        assert given.modality == wanted.modality
        asked = "".join(p.text for p in found.messages[0].content if isinstance(p, Text))
        if given.modality == "image":
            assert old.split("-")[-1] == new.split()[-1]
            assert new.split()[1] in asked
        else:
            assert new.split()[1] in old
            assert any(asked.endswith(f"so that it {motion}.") for motion in MOTIONS.values())
        assert old.startswith("val") == (wanted.data.decode().startswith("val"))
