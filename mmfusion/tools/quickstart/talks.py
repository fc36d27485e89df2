"""Multi-turn instructions about pictures, speech and clips, made of what people wrote of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmfusion.tools.quickstart.concepts import fraction, split_of
from mmfusion.tools.quickstart.datasets import (
    CLIP_FRAMES,
    CLIP_RATE,
    CLIP_SIZE,
    LANGUAGES,
    PICTURE_SIZE,
    SPOKEN,
    Entry,
    chat_entry,
    films,
    motion_caption,
)
from mmfusion.tools.quickstart.pictures import (
    MOTIONS,
    encode_jpeg,
    encode_mp4,
    flatten,
    motion_frames,
)
from mmfusion.tools.quickstart.sources import KINDS, Picture

Turns = list[tuple[str, str]]


def talks(items: Sequence[Picture]) -> Iterator[Entry]:
    """For every stamp a conversation about its picture, and by turns one about its speech, about
    both together, or about a clip of it.
    """
    for item in items:
        if item.source not in ("stamps", "clipart"):
            continue
        yield about_picture(item)
        kinds = [about_clip, *([about_speech, about_both] if _spoken(item) else [])]
        for maker in kinds:
            yield maker(item)


def film_talks(package: Path) -> Iterator[Entry]:
    """What clips of real films show."""
    for entry in films(package):
        about = json.loads(entry.record["json"])
        yield chat_entry(
            entry.split,
            f"film-{entry.key}",
            {"mp4": entry.record["mp4"]},
            [("<video>\nWhat happens in this clip?", entry.record["txt"].decode())],
            concept=about["concept"],
            source="talks-film",
        )


def about_picture(item: Picture) -> Entry:
    """What it is, which kind of thing, and how that is said in another language."""
    picture = encode_jpeg(flatten(item.load(), PICTURE_SIZE))
    turns = [("<image>\nWhat is in this picture?", item.caption), *_kind(item), *_translation(item)]
    return _entry(item, "picture", {"jpg": picture}, turns)


def about_speech(item: Picture) -> Entry:
    """What a person says, and what that is in English."""
    language = _language(item)
    turns = [("<audio>\nWrite down what the speaker says.", item.said(language))]
    if language != "en":
        turns.append(("Say it in English.", item.caption))
    return _entry(item, f"speech-{language}", {"ogg": item.speech[language].read_bytes()}, turns)


def about_both(item: Picture) -> Entry:
    """Picture and speech in one turn."""
    picture = encode_jpeg(flatten(item.load(), PICTURE_SIZE))
    media = {"jpg": picture, "ogg": item.speech[_language(item)].read_bytes()}
    question = "<image>\n<audio>\nThe speaker names what the picture shows. What is it, in English?"
    return _entry(item, "both", media, [(question, item.caption), *_translation(item)])


def about_clip(item: Picture) -> Entry:
    """What moves, and how."""
    motion = motion_of(item)
    clip = encode_mp4(motion_frames(item.load(), motion, CLIP_FRAMES, CLIP_SIZE), CLIP_RATE)
    turns = [
        ("<video>\nWhat happens in this clip?", motion_caption(item.caption, motion)),
        ("What does it do?", f"It {MOTIONS[motion]}."),
    ]
    return _entry(item, "clip", {"mp4": clip}, turns)


def motion_of(item: Picture) -> str:
    """What it does in the talk about it."""
    return sorted(MOTIONS)[int(fraction(f"talk about {item.name}") * len(MOTIONS))]


def _spoken(item: Picture) -> list[str]:
    """The languages in which it can be heard and read."""
    return [language for language in SPOKEN if language in item.speech and item.said(language)]


def _language(item: Picture) -> str:
    spoken = _spoken(item)
    return spoken[int(fraction(f"language of {item.name}") * len(spoken))]


def _kind(item: Picture) -> Turns:
    """A choice between the stamp's kind and another one, in an order of its own."""
    if not item.kind:
        return []
    others = sorted(set(KINDS.values()) - {item.kind})
    pair = [item.kind, others[int(fraction(f"other kind for {item.name}") * len(others))]]
    if fraction(f"order for {item.name}") < 0.5:
        pair.reverse()
    return [(f"Is it {pair[0]} or {pair[1]}?", f"It is {item.kind}.")]


def _translation(item: Picture) -> Turns:
    known = sorted(set(item.translations) & set(LANGUAGES))
    if not known:
        return []
    language = known[int(fraction(f"translation of {item.name}") * len(known))]
    return [(f"Say it in {LANGUAGES[language]}.", item.translations[language])]


def _entry(item: Picture, kind: str, media: dict[str, bytes], turns: Turns) -> Entry:
    return chat_entry(
        split_of(item.concept),
        f"{kind}-{item.source}-{item.name}",
        media,
        turns,
        concept=item.concept,
        source=f"talks-{kind.split('-')[0]}",
    )
