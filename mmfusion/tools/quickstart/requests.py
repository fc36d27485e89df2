"""Conversations in which pictures, sounds and clips are asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mmfusion.tools.quickstart.concepts import fraction
from mmfusion.tools.quickstart.datasets import Entry, chat_entry
from mmfusion.tools.quickstart.pictures import MOTIONS
from mmfusion.tools.quickstart.things import Thing, turned

REQUESTS = {
    "image": (
        "Draw {thing}.",
        "Please draw {thing} for me.",
        "Make a picture of {thing}.",
        "Create an image of {thing}.",
        "I want a drawing of {thing}.",
        "Can you show me a picture of {thing}?",
        "Generate an image with {thing} in it.",
        "Show me {thing}.",
        "Could you draw {thing}?",
        "Let me see {thing} in a picture.",
        "Give us an image that shows {thing}.",
        "A drawing of {thing}, please.",
        "Design a graphic of {thing} on white.",
        "We need a photo of {thing}.",
        "Would you do a portrait of {thing}?",
        "Doodle {thing}.",
        "Put {thing} on paper.",
        "I would like to see {thing}.",
        "Make us {thing} to look at.",
        "Picture {thing} for me.",
        "Get me a poster with {thing} on it.",
        "Show us how {thing} looks.",
        "Design this: {thing}.",
        "We want something with {thing} on the wall.",
    ),
    "audio": (
        "Play {thing}.",
        "Let me hear {thing}.",
        "Make the sound of {thing}.",
        "What does {thing} sound like?",
        "I want to hear {thing}.",
        "Please play the sound of {thing} for me.",
        "Create a recording of {thing}.",
        "Can you make it sound like {thing}?",
        "Could you play us {thing}?",
        "We would like to hear {thing}.",
        "Give me the sound of {thing}.",
        "A recording of {thing}, please.",
        "Imitate {thing}.",
        "Would you let us hear some of {thing}?",
        "Record {thing} for me.",
        "Sing like {thing}.",
        "Let it sound: {thing}.",
        "I need to hear {thing} now.",
        "Turn on {thing}, loud.",
        "How would {thing} sound?",
        "Send me a sound of {thing}.",
        "Ring out like {thing}.",
        "Put {thing} on the radio.",
        "We want the sound that comes from {thing}.",
    ),
    "video": (
        "Make a clip in which {thing}.",
        "Show me a video where {thing}.",
        "Create a short video: {thing}.",
        "Film this: {thing}.",
        "Let me see a clip in which {thing}.",
        "I want a video where {thing}.",
        "Generate a short clip: {thing}.",
        "Can you film how {thing}?",
        "Could we see a video where {thing}?",
        "Let us watch it: {thing}.",
        "Give me a clip of this: {thing}.",
        "A video, please: {thing}.",
        "Put it on film: {thing}.",
        "Would you make us a clip where {thing}?",
        "We need moving pictures in which {thing}.",
        "Record how {thing}.",
        "Bring it to life: {thing}.",
        "Make it move: {thing}.",
        "Set it in motion: {thing}.",
        "Act it out: {thing}.",
        "Turn this into a cartoon: {thing}.",
        "I would like to watch how {thing}.",
        "Get me some film in which {thing}.",
        "Could you record a video where {thing}?",
    ),
}
"""How media are asked for in training."""

NEW_REQUESTS = {
    "image": (
        "Paint {thing}.",
        "Could you sketch {thing}?",
        "Illustrate {thing} on a plain background.",
        "We would love some artwork depicting {thing}.",
    ),
    "audio": (
        "May we listen to {thing}?",
        "Perform {thing} out loud.",
        "Give us some noise from {thing}.",
        "Produce audio of {thing}.",
    ),
    "video": (
        "Animate it: {thing}.",
        "Could we get an animation where {thing}?",
        "Shoot footage in which {thing}.",
        "Render a movie scene where {thing}.",
    ),
}
"""How they are asked for when it is measured: each asks by a word that no request of training has.
"""


def requests(things: Iterable[Thing], ways: int = 1) -> Iterator[Entry]:
    """Each thing asked for in so many ways; what is held out in one, in new words. Half of the
    answers say what they show.
    """
    for thing in things:
        trained = thing.split == "train"
        options = (REQUESTS if trained else NEW_REQUESTS)[thing.modality]
        chosen = turned(options, f"request for {thing.key}")[: ways if trained else 1]
        for number, way in enumerate(chosen):
            asked = way.format(thing=thing.words)
            source = f"asks-{thing.modality}"
            yield _asked(thing, _key("ask", thing, number), asked, source=source)


def remakes(things: Iterable[Thing], ways: int = 1) -> Iterator[Entry]:
    """A picture of a shape and the wish for it in another color; a clip of something and the wish
    for another motion. Each is remade into at most so many others, what is held out into one.
    """
    groups: dict[tuple[str, str], list[Thing]] = defaultdict(list)
    for thing in things:
        if thing.modality in _KEPT:
            groups[thing.split, _KEPT[thing.modality](thing.caption)].append(thing)
    for group in groups.values():
        for thing in group:
            others = [other for other in group if other.caption != thing.caption]
            chosen = turned(others, f"remake of {thing.key}")
            for number, other in enumerate(chosen[: ways if thing.split == "train" else 1]):
                yield _remake(thing, other, _key("remake", thing, number))


def _remake(thing: Thing, wanted: Thing, key: str) -> Entry:
    if thing.modality == "image":
        asked = f"Draw the same shape in {wanted.words.split()[1]}."
    else:
        motion = next(m for m in MOTIONS.values() if wanted.words.endswith(m))
        asked = f"Now film it so that it {motion}."
    given = {f"given.{thing.extension}": thing.data}
    content: list[Any] = [
        {"type": thing.modality, thing.modality: f"given.{thing.extension}"},
        {"type": "text", "text": f"\n{asked}"},
    ]
    return _asked(wanted, key, content, given, source=f"remakes-{thing.modality}")


def _shape(caption: str) -> str:
    return caption.rstrip(".").split()[-1]


def _subject(caption: str) -> str:
    motion = next(m for m in MOTIONS.values() if caption.rstrip(".").endswith(m))
    return caption.removesuffix(f" {motion}.")


_KEPT = {"image": _shape, "video": _subject}
"""What a remake keeps of a caption."""


def _asked(
    thing: Thing, key: str, asked: Any, given: Mapping[str, bytes] | None = None, **about: Any
) -> Entry:
    medium = {
        "type": thing.modality,
        thing.modality: f"made.{thing.extension}",
        "caption": thing.caption,
    }
    said = {"type": "text", "text": _SAYING[thing.modality].format(thing=thing.words)}
    answer = [said, medium] if fraction(f"words for {key}") < 0.5 else [medium]
    entry = chat_entry(
        thing.split,
        key,
        {**(given or {}), f"made.{thing.extension}": thing.data},
        [(asked, answer)],
        **{**thing.about, **about, "modality": thing.modality, "caption": thing.caption},
    )
    return entry


_SAYING = {
    "image": "Here is {thing}. ",
    "audio": "This is {thing}. ",
    "video": "Here {thing}. ",
}


def _key(what: str, thing: Thing, number: int) -> str:
    return f"{what}-{thing.key}" + (f"-{number}" if number else "")
