"""Reads captioned pictures out of the unpacked packages: Tux Paint's stamps, drawings of words,
emoji, and the small set committed with the tests.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

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
_EMOJI = (range(0x231A, 0x2B60), range(0x1F300, 0x1FB00))
_EMOJI_SIZE = 109
"""The one size of the font's bitmaps."""


@dataclass(frozen=True)
class Picture:
    """A picture and what is said about it.

    Attributes:
        name: unique, fit for a shard key.
        source: ``stamps``, ``drawings``, ``emoji`` or ``clipart``.
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
    pictures = []
    if package := folders.get("tuxpaint-stamps-default"):
        pictures += read_stamps(package / "usr" / "share" / "tuxpaint" / "stamps")
    elif committed and (committed / "manifest.json").exists():
        pictures += read_committed(committed)
    else:
        raise FileNotFoundError(
            "there are no pictures to train on: Debian's stamps cannot be had here, and the small "
            "set of a source checkout (tests/assets) is not beside this installation. Run the "
            "quickstart from a source checkout (`pip install -e .`)."
        )
    if package := folders.get("pysiogame"):
        pictures += read_drawings(
            package / "usr" / "share" / "games" / "pysiogame" / "res" / "images" / "art4apps"
        )
    if package := folders.get("fonts-noto-color-emoji"):
        pictures += read_emoji(next(package.rglob("NotoColorEmoji.ttf")))
    return pictures


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


def read_drawings(root: Path) -> list[Picture]:
    """Drawings of single words, named by their files."""
    return [
        Picture(
            name=f"{path.parent.name}-{path.stem}",
            source="drawings",
            caption=path.stem.replace("_", " ").capitalize() + ".",
            load=partial(Image.open, path),
        )
        for path in sorted(root.glob("*/*.jpg"))
    ]


def read_emoji(font_file: Path) -> list[Picture]:
    """The font's pictures of single code points under their Unicode names."""
    font = ImageFont.truetype(str(font_file), _EMOJI_SIZE)
    pictures = []
    for code in (code for span in _EMOJI for code in span):
        name = unicodedata.name(chr(code), "")
        if not name or "REGIONAL" in name or "MODIFIER" in name:
            continue
        if render_emoji(font, chr(code)).getbbox() is None:
            continue
        caption = name.capitalize() + "."
        pictures.append(
            Picture(f"emoji-{code:x}", "emoji", caption, partial(render_emoji, font, chr(code)))
        )
    return pictures


def render_emoji(font: ImageFont.FreeTypeFont, text: str) -> Frame:
    """One emoji with its transparency; nothing drawn where the font has none."""
    image = Image.new("RGBA", (136, 128))
    ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
    return image


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
