"""Reads captioned pictures out of the unpacked packages: Tux Paint's stamps, or the small
set committed with the tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from mmfusion.tools.quickstart.concepts import concept
from mmfusion.tools.quickstart.pictures import Frame

KINDS = {
    "animals": "an animal",
    "clothes": "clothing",
    "food": "food",
    "hobbies": "a hobby object",
    "household": "a household object",
    "medical": "something medical",
    "military": "something military",
    "naturalforces": "a natural force",
    "people": "a person",
    "plants": "a plant",
    "seasonal": "something for a holiday",
    "space": "something in space",
    "sports": "sports equipment",
    "symbols": "a symbol",
    "town": "something in a town",
    "vehicles": "a vehicle",
}
"""What a stamp is, by its top folder."""

MAX_WORDS = 8
_TRANSLATION = re.compile(r"([a-z]{2,3}(?:_[A-Z]{2})?)\.utf8=(.+)")
_SPEECH = re.compile(r"_desc(?:_([a-z]{2,3}))?\.ogg")
_LETTERS = "symbols/alphabets"


@dataclass(frozen=True)
class Picture:
    """A picture and what is said about it.

    Attributes:
        name: unique, fit for a shard key.
        source: ``stamps`` or ``clipart``.
        caption: in English.
        load: opens the picture.
        kind: for stamps one of ``KINDS``' values, else empty.
        translations: the caption by language code.
        speech: files of people (clipart: a synthesiser) speaking the caption, by language code.
    """

    name: str
    source: str
    caption: str
    load: Callable[[], Frame] = field(repr=False)
    kind: str = ""
    translations: dict[str, str] = field(default_factory=dict, repr=False)
    speech: dict[str, Path] = field(default_factory=dict, repr=False)

    @property
    def concept(self) -> str:
        return concept(self.caption)

    def said(self, language: str) -> str:
        """The caption in a language; empty where it has none."""
        return self.caption if language == "en" else self.translations.get(language, "")


def read_pictures(folders: dict[str, Path], committed: Path | None) -> list[Picture]:
    """Every captioned picture of the packages at hand.

    Args:
        folders: unpacked packages by asset name.
        committed: the folder of the committed set; read where there are no stamps.

    Raises:
        FileNotFoundError: neither is there.
    """
    if package := folders.get("tuxpaint-stamps-default"):
        return read_stamps(package / "usr" / "share" / "tuxpaint" / "stamps")
    if committed and (committed / "manifest.json").exists():
        return read_committed(committed)
    raise FileNotFoundError(
        "there are no pictures to train on: Debian's stamps cannot be had here, and the small "
        "set of a source checkout (tests/assets) is not beside this installation. Run the "
        "quickstart from a source checkout (`pip install -e .`)."
    )


def read_stamps(root: Path) -> list[Picture]:
    """The stamps that have a PNG and a caption of at most ``MAX_WORDS`` words.

    Left out: pictures of single letters and finger signs (a letter that was never seen cannot be
    named, and they would be a quarter of what is measured), and drawings without a PNG.
    """
    stamps = []
    for text in sorted(root.rglob("*.txt")):
        relative = text.relative_to(root).with_suffix("")
        if not text.with_suffix(".png").exists() or relative.as_posix().startswith(_LETTERS):
            continue
        caption, *lines = text.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        caption = caption.strip()
        if not concept(caption) or len(caption.split()) > MAX_WORDS:
            continue
        matches = (_TRANSLATION.fullmatch(line.strip()) for line in lines)
        stamps.append(
            Picture(
                name=re.sub(r"[^\w-]+", "-", relative.as_posix()),
                source="stamps",
                caption=caption,
                load=partial(Image.open, text.with_suffix(".png")),
                kind=KINDS.get(relative.parts[0], ""),
                translations={m[1]: m[2].strip() for m in matches if m and m[2].strip()},
                speech=_speech_files(text),
            )
        )
    return stamps


def _speech_files(text: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(text.parent.glob(f"{text.stem}_desc*.ogg")):
        if match := _SPEECH.fullmatch(path.name.removeprefix(text.stem)):
            found[match[1] or "en"] = path
    return found


def read_committed(folder: Path) -> list[Picture]:
    """The captioned clipart of ``tests/assets``, with its synthetic speech."""
    return [
        Picture(
            name=Path(entry["picture"]).stem,
            source="clipart",
            caption=entry["caption"],
            load=partial(Image.open, folder / entry["picture"]),
            speech={"en": folder / entry["speech"]} if "speech" in entry else {},
        )
        for entry in json.loads((folder / "manifest.json").read_text())
    ]
