"""Held-out samples of a data set, and the same samples with other media."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image

from mmfusion.data.source import Source
from mmfusion.tools.quickstart.concepts import fraction
from mmfusion.tools.quickstart.datasets import CLIP_FRAMES, CLIP_RATE, CLIP_SIZE, PICTURE_SIZE
from mmfusion.tools.quickstart.pictures import encode_jpeg, encode_mp4
from mmfusion.types import Media, Message, Sample, Text


@dataclass(frozen=True)
class HeldOut:
    """A held-out sample and what its record says about it.

    Attributes:
        sample: as the recipe's converter makes it.
        about: the record's ``json``: ``concept``, ``source`` and more.
    """

    sample: Sample
    about: dict[str, Any]

    @property
    def concept(self) -> str:
        return self.about["concept"]

    @property
    def answer(self) -> str:
        """The text of the last assistant turn."""
        return text_of(self.sample.messages[-1])


def read_held_out(source: Source, limit: int | None = None) -> list[HeldOut]:
    """The samples of a validation source; with a limit an even choice by key, the same always."""
    found = []
    for index in range(len(source)):
        record, shard, key = source.shards.read(index)
        found.append(HeldOut(source.converter(record, shard, key), json.loads(record["json"])))
    return sorted(found, key=lambda item: fraction(f"measure {item.sample.key}"))[:limit]


def text_of(message: Message) -> str:
    """The message's text without its media."""
    return "".join(part.text for part in message.content if isinstance(part, Text)).strip()


def with_media(sample: Sample, media: Sequence[Media]) -> Sample:
    """The sample with its media items replaced, in reading order."""
    rest = iter(media)
    messages = tuple(
        Message(
            message.role,
            tuple(next(rest) if isinstance(part, Media) else part for part in message.content),
        )
        for message in sample.messages
    )
    return replace(sample, messages=messages)


def strangers(items: Sequence[HeldOut], count: int, draw: int = 0) -> list[list[int]]:
    """For each item, ``count`` others of the same source with another concept, all of different
    concepts, drawn without repetition (fewer where there are no more). Each ``draw`` is another.
    """
    groups = defaultdict(list)
    for index, item in enumerate(items):
        groups[item.about["source"]].append(index)
    chosen = []
    for item in items:
        rng = np.random.default_rng(int(fraction(f"strangers {draw} of {item.sample.key}") * 2**63))
        seen: set[str] = {item.concept}
        found: list[int] = []
        for other in rng.permutation(groups[item.about["source"]]).tolist():
            if len(found) < count and items[other].concept not in seen:
                found.append(other)
                seen.add(items[other].concept)
        chosen.append(found)
    return chosen


def blank(media: Media) -> Media:
    """Nothing to see or hear, in the same modality: a white picture, a white clip, near silence
    of the same length.
    """
    if media.modality == "audio":
        return Media("audio", _silence(_seconds(media.data)), "wav")
    return {"image": _white_picture, "video": _white_clip}[media.modality]()


def _seconds(data: bytes) -> float:
    with av.open(io.BytesIO(data)) as container:
        return float(container.duration or 10**6) / 10**6


def _silence(seconds: float) -> bytes:
    buffer = io.BytesIO()
    # All zeros are refused as silent media; this is below the last bit of most recordings.
    faint = 1e-4 * np.random.default_rng(0).standard_normal(int(seconds * 16_000))
    soundfile.write(buffer, faint, 16_000, format="WAV")
    return buffer.getvalue()


@cache
def _white_picture() -> Media:
    white = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), "white")
    return Media("image", encode_jpeg(white), "jpg")


@cache
def _white_clip() -> Media:
    white = Image.new("RGB", (CLIP_SIZE, CLIP_SIZE), "white")
    return Media("video", encode_mp4([white] * CLIP_FRAMES, CLIP_RATE), "mp4")


def alone(items: Sequence[HeldOut]) -> Iterator[tuple[HeldOut, Sample, str]]:
    """Every question of conversations, asked alone: (item, messages so far without the other
    turns, true answer). Media stay with the question.
    """
    for item in items:
        messages = item.sample.messages
        media = tuple(item.sample.media)
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            asked = Message("user", (*media, Text("\n" + text_of(question))))
            yield item, replace(item.sample, messages=(asked,)), text_of(answer)
