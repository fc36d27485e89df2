"""Things and the samples that are made of them, for the tests of requests and of questions."""

from __future__ import annotations

from typing import Any

from mmfusion.data.converters.conversation import Conversation
from mmfusion.tools.quickstart.datasets import Entry
from mmfusion.tools.quickstart.pictures import MOTIONS
from mmfusion.tools.quickstart.things import Thing
from mmfusion.types import Sample


def thing(caption: str, modality: str, split: str = "train", **about: Any) -> Thing:
    extension = {"image": "png", "audio": "flac", "video": "mp4"}[modality]
    key = f"{split}-{modality}-{caption}".replace(" ", "-").rstrip(".")
    return Thing(split, key, modality, caption, extension, key.encode(), {"concept": key, **about})


def shapes(split: str = "train") -> list[Thing]:
    return [
        thing(f"A {color} {shape}.", "image", split)
        for color in ("red", "blue", "teal")
        for shape in ("circle", "triangle")
    ]


def clips(split: str = "train") -> list[Thing]:
    return [
        thing(f"A {name} {words}.", "video", split, motion=motion)
        for name in ("goat", "red kite")
        for motion, words in MOTIONS.items()
    ]


def sample(entry: Entry) -> Sample:
    return Conversation()(entry.record, "shard", entry.key)
