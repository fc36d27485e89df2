"""Conversations in which pictures, sounds and clips are asked for, and others in which the same
things are talked about and words are the right answer.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmfusion.tools.quickstart.concepts import fraction, split_of
from mmfusion.tools.quickstart.datasets import LANGUAGES, Entry, chat_entry
from mmfusion.tools.quickstart.pictures import MOTIONS
from mmfusion.tools.quickstart.sources import Picture

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

CORNERS = {"circle": "None.", "rectangle": "Four.", "triangle": "Three."}


@dataclass(frozen=True)
class Thing:
    """What can be asked for, with a medium that shows it.

    Attributes:
        split: side of the split.
        key: fit for a shard key.
        modality: of the medium.
        caption: ``A blue circle.``
        extension: of the medium's file.
        data: the file.
        about: what else the record's ``json`` says of it.
    """

    split: str
    key: str
    modality: str
    caption: str
    extension: str
    data: bytes
    about: Mapping[str, Any]

    @property
    def words(self) -> str:
        """The caption within a sentence: ``a blue circle``."""
        return self.caption[:1].lower() + self.caption[1:].rstrip(".!?")


def things(entries: Iterable[Entry], modality: str, extension: str) -> Iterator[Thing]:
    """Entries of one medium with its caption, as things."""
    for entry in entries:
        about = json.loads(entry.record["json"])
        caption = entry.record["txt"].decode()
        data = entry.record[extension]
        yield Thing(entry.split, entry.key, modality, caption, extension, data, about)


def requests(things: Iterable[Thing], ways: int = 1) -> Iterator[Entry]:
    """Each thing asked for in so many ways; what is held out in one, in new words. Half of the
    answers say what they show.
    """
    for thing in things:
        trained = thing.split == "train"
        options = (REQUESTS if trained else NEW_REQUESTS)[thing.modality]
        chosen = _turned(options, f"request for {thing.key}")[: ways if trained else 1]
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
            chosen = _turned(others, f"remake of {thing.key}")
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


def words(things: Iterable[Thing], pictures: Iterable[Picture]) -> Iterator[Entry]:
    """Questions about the same things that words answer."""
    for thing in things:
        new = thing.split != "train"
        pairs = _QUESTIONS[thing.modality](thing, new)
        question, answer = _chosen(pairs, f"question about {thing.key}")
        yield _worded(thing.split, f"words-{thing.key}", question, answer, thing.about["concept"])
    for picture in pictures:
        known = sorted(set(picture.translations) & set(LANGUAGES))
        if known:
            split = split_of(picture.concept)
            language = _chosen(known, f"words in a language for {picture.name}")
            asked = "What is {} in {}?" if split == "train" else "Translate {} into {}."
            question = asked.format(f"\u201c{picture.caption}\u201d", LANGUAGES[language])
            answer = picture.translations[language]
            yield _worded(split, f"words-{picture.name}", question, answer, picture.concept)


def _worded(split: str, key: str, question: str, answer: str, concept: str) -> Entry:
    return chat_entry(split, key, {}, [(question, answer)], concept=concept, source="words")


def _about_shape(thing: Thing, new: bool) -> list[tuple[str, str]]:
    _, color, shape = thing.words.split()
    corners = CORNERS[shape]
    if new:
        return [
            (f"Name the color of {thing.words}.", f"{color.capitalize()}."),
            (f"Count the corners of {thing.words}.", corners),
        ]
    cornered = "No." if shape == "circle" else "Yes."
    return [
        (f"What color is {thing.words}?", f"{color.capitalize()}."),
        (f"How many corners does {thing.words} have?", corners),
        (f"Which shape is {thing.words}?", f"A {shape}."),
        (f"Tell me which color {thing.words} has.", f"{color.capitalize()}."),
        (f"Say how many corners there are in {thing.words}.", corners),
        (f"Can {thing.words} have corners?", cornered),
        (f"Write down the color of {thing.words}.", f"{color.capitalize()}."),
        (f"Would {thing.words} roll?", "Yes." if shape == "circle" else "No."),
        (f"Type this: {thing.words}.", thing.caption),
        (f"Find out how many corners {thing.words} has.", corners),
        (f"Give the number of corners of {thing.words}.", corners),
        (f"Work out the corners of {thing.words}.", corners),
        (f"List the corners of {thing.words} as a number.", corners),
        (f"Check whether {thing.words} has corners.", cornered),
        (f"Explain whether there are corners in {thing.words}.", cornered),
        (f"State the color of {thing.words}.", f"{color.capitalize()}."),
        (f"Describe {thing.words} by its color alone.", f"{color.capitalize()}."),
        (f"In one word, which color would {thing.words} be?", f"{color.capitalize()}."),
        (f"Guess the shape of {thing.words}.", f"A {shape}."),
        (
            f"Choose between round and not round for {thing.words}.",
            "Round." if shape == "circle" else "Not round.",
        ),
    ]


def _about_sound(thing: Thing, new: bool) -> list[tuple[str, str]]:
    animal = "Yes." if thing.words == "a bird" else "No."
    written = f"You write it \u201c{thing.words}\u201d."
    if new:
        return [
            (f"Would you call {thing.words} an animal?", animal),
            (f"Spell out the words {thing.words}.", written),
        ]
    return [
        (f"Is {thing.words} an animal?", animal),
        (f"How do you write {thing.words}?", written),
        (f"Can you tell me if {thing.words} is alive?", animal),
        (f"Could {thing.words} lay an egg?", animal),
        (f"Say {thing.words} in capital letters.", f"{thing.words.upper()}."),
        (f"Repeat after me: {thing.words}.", thing.caption),
        (f"Does {thing.words} have wings?", animal),
        (f"Type the words {thing.words}.", written),
        (f"Tell me in words whether {thing.words} eats.", animal),
        (f"Check whether {thing.words} is an animal.", animal),
        (f"State whether {thing.words} lives.", animal),
        (f"Find out whether {thing.words} lays eggs.", animal),
        (f"Explain in a word if {thing.words} breathes.", animal),
        (f"Give me the letters of {thing.words}.", written),
        (f"Put {thing.words} in writing.", written),
        (f"Read this back to me: {thing.words}.", thing.caption),
    ]


def _about_clip(thing: Thing, new: bool) -> list[tuple[str, str]]:
    motion = MOTIONS[thing.about["motion"]]
    subject = thing.words.removesuffix(f" {motion}")
    if new:
        return [(f"Someone says that {thing.words}. Repeat who.", f"{subject.capitalize()}.")]
    return [
        (f"If {thing.words}, what does it do?", f"It {motion}."),
        (f"If {thing.words}, who does that?", f"{subject.capitalize()}."),
        (f"I heard that {thing.words}. Tell me who does.", f"{subject.capitalize()}."),
        (f"Say what it does when {thing.words}.", f"It {motion}."),
        (f"My sister saw that {thing.words}. Who was it?", f"{subject.capitalize()}."),
        (f"They told us that {thing.words}. Write down who.", f"{subject.capitalize()}."),
        (f"It is said that {thing.words}. Answer in words: what does it do?", f"It {motion}."),
        (f"Type this: {thing.words}.", thing.caption),
        (f"Read this back to me: {thing.words}.", thing.caption),
        (f"Explain what it does when {thing.words}.", f"It {motion}."),
        (f"Work out from this what it does: {thing.words}.", f"It {motion}."),
        (f"Check who it is: {thing.words}.", f"{subject.capitalize()}."),
        (f"State who it is if {thing.words}.", f"{subject.capitalize()}."),
        (f"We read that {thing.words}. Guess who it was.", f"{subject.capitalize()}."),
        (f"It was in the paper that {thing.words}. Give the name.", f"{subject.capitalize()}."),
        (f"People say that {thing.words}. Which one is it?", f"{subject.capitalize()}."),
        (f"A friend wrote that {thing.words}. List who.", f"{subject.capitalize()}."),
    ]


_QUESTIONS = {"image": _about_shape, "audio": _about_sound, "video": _about_clip}


def _chosen(options: Sequence[Any], why: str) -> Any:
    return _turned(options, why)[0]


def _turned(options: Sequence[Any], why: str) -> Sequence[Any]:
    """All of them, beginning anywhere."""
    first = int(fraction(why) * len(options))
    return [*options[first:], *options[:first]]


def _key(what: str, thing: Thing, number: int) -> str:
    return f"{what}-{thing.key}" + (f"-{number}" if number else "")
