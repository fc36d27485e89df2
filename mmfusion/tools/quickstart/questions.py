"""Conversations about the things that can be asked for as media, in which words are the right
answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from mmfusion.tools.quickstart.concepts import split_of
from mmfusion.tools.quickstart.datasets import LANGUAGES, Entry, chat_entry
from mmfusion.tools.quickstart.pictures import MOTIONS
from mmfusion.tools.quickstart.sources import Picture
from mmfusion.tools.quickstart.things import Thing, turned

QUESTIONS = {
    "image": (
        ("What color is {thing}?", "color"),
        ("How many corners does {thing} have?", "corners"),
        ("Which shape is {thing}?", "shape"),
        ("Tell me which color {thing} has.", "color"),
        ("Say how many corners there are in {thing}.", "corners"),
        ("Can {thing} have corners?", "cornered"),
        ("Write down the color of {thing}.", "color"),
        ("Would {thing} roll?", "rolls"),
        ("Type this: {thing}.", "caption"),
        ("Find out how many corners {thing} has.", "corners"),
        ("Give the number of corners of {thing}.", "corners"),
        ("Work out the corners of {thing}.", "corners"),
        ("List the corners of {thing} as a number.", "corners"),
        ("Check whether {thing} has corners.", "cornered"),
        ("Explain whether there are corners in {thing}.", "cornered"),
        ("State the color of {thing}.", "color"),
        ("Describe {thing} by its color alone.", "color"),
        ("In one word, which color would {thing} be?", "color"),
        ("Guess the shape of {thing}.", "shape"),
        ("Choose between round and not round for {thing}.", "round"),
    ),
    "audio": (
        ("Is {thing} an animal?", "animal"),
        ("How do you write {thing}?", "written"),
        ("Can you tell me if {thing} is alive?", "animal"),
        ("Could {thing} lay an egg?", "animal"),
        ("Say {thing} in capital letters.", "capitals"),
        ("Repeat after me: {thing}.", "caption"),
        ("Does {thing} have wings?", "animal"),
        ("Type the words {thing}.", "written"),
        ("Tell me in words whether {thing} eats.", "animal"),
        ("Check whether {thing} is an animal.", "animal"),
        ("State whether {thing} lives.", "animal"),
        ("Find out whether {thing} lays eggs.", "animal"),
        ("Explain in a word if {thing} breathes.", "animal"),
        ("Give me the letters of {thing}.", "written"),
        ("Put {thing} in writing.", "written"),
        ("Read this back to me: {thing}.", "caption"),
    ),
    "video": (
        ("If {thing}, what does it do?", "does"),
        ("If {thing}, who does that?", "who"),
        ("I heard that {thing}. Tell me who does.", "who"),
        ("Say what it does when {thing}.", "does"),
        ("My sister saw that {thing}. Who was it?", "who"),
        ("They told us that {thing}. Write down who.", "who"),
        ("It is said that {thing}. Answer in words: what does it do?", "does"),
        ("Type this: {thing}.", "caption"),
        ("Read this back to me: {thing}.", "caption"),
        ("Explain what it does when {thing}.", "does"),
        ("Work out from this what it does: {thing}.", "does"),
        ("Check who it is: {thing}.", "who"),
        ("State who it is if {thing}.", "who"),
        ("We read that {thing}. Guess who it was.", "who"),
        ("It was in the paper that {thing}. Give the name.", "who"),
        ("People say that {thing}. Which one is it?", "who"),
        ("A friend wrote that {thing}. List who.", "who"),
    ),
}
"""Questions of training, and which of the answers to a thing each gets."""

NEW_QUESTIONS = {
    "image": (
        ("Name the color of {thing}.", "color"),
        ("Count the corners of {thing}.", "corners"),
    ),
    "audio": (
        ("Would you call {thing} an animal?", "animal"),
        ("Spell out the words {thing}.", "written"),
    ),
    "video": (("Someone says that {thing}. Repeat who.", "who"),),
}
"""Questions that are asked when it is measured."""

CORNERS = {"circle": "None.", "rectangle": "Four.", "triangle": "Three."}


def words(things: Iterable[Thing], pictures: Iterable[Picture]) -> Iterator[Entry]:
    """A question about each thing and one for the name of each picture in another language; about
    what is held out, in new words.
    """
    for thing in things:
        options = (QUESTIONS if thing.split == "train" else NEW_QUESTIONS)[thing.modality]
        question, kind = turned(options, f"question about {thing.key}")[0]
        asked, answer = question.format(thing=thing.words), _ANSWERS[thing.modality](thing)[kind]
        yield _worded(thing.split, f"words-{thing.key}", asked, answer, thing.about["concept"])
    for picture in pictures:
        known = sorted(set(picture.translations) & set(LANGUAGES))
        if known:
            split = split_of(picture.concept)
            language = turned(known, f"words in a language for {picture.name}")[0]
            question = "What is {} in {}?" if split == "train" else "Translate {} into {}."
            asked = question.format(f"\u201c{picture.caption}\u201d", LANGUAGES[language])
            answer = picture.translations[language]
            yield _worded(split, f"words-{picture.name}", asked, answer, picture.concept)


def _worded(split: str, key: str, question: str, answer: str, concept: str) -> Entry:
    return chat_entry(split, key, {}, [(question, answer)], concept=concept, source="words")


def _of_shape(thing: Thing) -> Mapping[str, str]:
    _, color, shape = thing.words.split()
    is_round = shape == "circle"
    return {
        "caption": thing.caption,
        "color": f"{color.capitalize()}.",
        "shape": f"A {shape}.",
        "corners": CORNERS[shape],
        "cornered": _yes(not is_round),
        "rolls": _yes(is_round),
        "round": "Round." if is_round else "Not round.",
    }


def _of_sound(thing: Thing) -> Mapping[str, str]:
    return {
        "caption": thing.caption,
        "animal": _yes(thing.words == "a bird"),
        "written": f"You write it \u201c{thing.words}\u201d.",
        "capitals": f"{thing.words.upper()}.",
    }


def _of_clip(thing: Thing) -> Mapping[str, str]:
    motion = MOTIONS[thing.about["motion"]]
    subject = thing.words.removesuffix(f" {motion}")
    return {
        "caption": thing.caption,
        "does": f"It {motion}.",
        "who": f"{subject.capitalize()}.",
    }


def _yes(true: bool) -> str:
    return "Yes." if true else "No."


_ANSWERS = {"image": _of_shape, "audio": _of_sound, "video": _of_clip}
"""Every answer to a thing, by its kind."""
