"""Questions about the things that can be asked for, which words answer."""

from __future__ import annotations

import pytest

from mmfusion.tools.quickstart.questions import NEW_QUESTIONS, QUESTIONS, words
from mmfusion.tools.quickstart.requests import NEW_REQUESTS, REQUESTS
from mmfusion.tools.quickstart.things import Thing
from mmfusion.types import Text
from tests.tools.quickstart.thing_samples import clips, sample, shapes, thing

BIRD, WAVES = thing("A bird.", "audio"), thing("Ocean waves.", "audio")


def answers(things: list[Thing]) -> dict[str, str]:
    """Answers by question, each as text."""
    found = {}
    for entry in words(things, []):
        asked, answered = sample(entry).messages
        ((question,), (answer,)) = (asked.content, answered.content)
        assert isinstance(question, Text)
        assert isinstance(answer, Text)
        found[question.text] = answer.text
    return found


@pytest.mark.parametrize("table", [QUESTIONS, NEW_QUESTIONS])
def test_each_question_is_about_one_thing_and_asked_once(
    table: dict[str, tuple[tuple[str, str], ...]],
) -> None:
    for questions in table.values():
        texts = [question for question, _ in questions]
        assert all(text.count("{thing}") == 1 for text in texts)
        assert len(set(texts)) == len(texts)


def test_no_measured_question_is_trained_and_none_is_a_request() -> None:
    requests = {way for ways in (*REQUESTS.values(), *NEW_REQUESTS.values()) for way in ways}
    trained = {question for questions in QUESTIONS.values() for question, _ in questions}
    measured = {question for questions in NEW_QUESTIONS.values() for question, _ in questions}
    assert not measured & trained
    assert not requests & (trained | measured)


def test_questions_are_answered_in_words_about_the_thing() -> None:
    many = [
        Thing(one.split, f"{one.key}-{i}", one.modality, one.caption, one.extension, b"", one.about)
        for one in (*shapes(), *clips(), BIRD, WAVES)
        for i in range(300)
    ]
    found = answers(many)
    expected = {
        "How many corners does a red circle have?": "None.",
        "What color is a teal triangle?": "Teal.",
        "Guess the shape of a blue triangle.": "A triangle.",
        "Can a blue circle have corners?": "No.",
        "Would a red circle roll?": "Yes.",
        "Choose between round and not round for a red triangle.": "Not round.",
        "Is a bird an animal?": "Yes.",
        "Is ocean waves an animal?": "No.",
        "Say a bird in capital letters.": "A BIRD.",
        "Put ocean waves in writing.": "You write it \u201cocean waves\u201d.",
        "Repeat after me: ocean waves.": "Ocean waves.",
    }
    assert {question: found.get(question) for question in expected} == expected
    who = {answer for question, answer in found.items() if question.endswith("who does that?")}
    assert who == {"A goat.", "A red kite."}


def test_held_out_things_are_asked_about_in_new_words() -> None:
    (question,) = answers([thing("A red circle.", "image", "val")])
    new = [asked.format(thing="a red circle") for asked, _ in NEW_QUESTIONS["image"]]
    assert question in new
