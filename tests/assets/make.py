"""Makes the small set of pictures, speech and clips beside this file (run once, output committed).

Public-domain clipart with hand-picked English titles, those titles spoken by espeak-ng, clips that
move the clipart, and a few pictures of shapes with questions. Where Debian's package of stamps
cannot be had, the quickstart trains on this set.

    python tests/assets/make.py OPENCLIPART_PNG EASY_VQA

OPENCLIPART_PNG is ``usr/share/openclipart/png`` of Debian's ``openclipart-png`` 1:0.18+dfsg-19,
EASY_VQA is ``easy_vqa/data`` of the PyPI package ``easy-vqa`` 1.0; ``espeak-ng`` must be on PATH.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import soundfile
import soxr
from PIL import Image

from mmfusion.tools.quickstart.pictures import MOTIONS, encode_mp4, flatten, motion_frames

HERE = Path(__file__).parent
SIZE = 112
VOICES = ("en-us", "en-gb", "en-us+f3", "en-gb+m4")
SPOKEN = 36
QUESTIONS = 6

TITLES = Path(__file__).with_name("titles.txt")


def main(clipart: Path, easy_vqa: Path) -> None:
    for folder in ("pictures", "speech", "videos", "shapes/images"):
        (HERE / folder).mkdir(parents=True, exist_ok=True)
    entries = []
    for number, line in enumerate(TITLES.read_text().splitlines()):
        caption, source = line.split("\t")
        entries.append(make_entry(number, caption, clipart / source) | {"source": source})
    (HERE / "manifest.json").write_text(json.dumps(entries, indent=1) + "\n")
    make_shapes(easy_vqa / "train")


def make_entry(number: int, caption: str, picture: Path) -> dict[str, str]:
    """One title's picture, for the first ones also its speech, for some a clip of it moving."""
    name = "_".join(caption.strip(".").lower().split()[1:])
    image = Image.open(picture)
    flatten(image, SIZE).save(HERE / "pictures" / f"{name}.jpg", quality=80, optimize=True)
    entry = {"caption": caption, "picture": f"pictures/{name}.jpg"}
    if number < SPOKEN:
        entry["speech"] = f"speech/{name}.ogg"
        speak(caption, VOICES[number % len(VOICES)], HERE / entry["speech"])
    if number < len(MOTIONS):
        motion = sorted(MOTIONS)[number]
        frames = motion_frames(image, motion, count=8, size=64)
        (HERE / "videos" / f"{name}.mp4").write_bytes(encode_mp4(frames, rate=4))
        entry |= {"video": f"videos/{name}.mp4", "motion": motion}
    return entry


def speak(text: str, voice: str, target: Path) -> None:
    wave = subprocess.run(
        ["espeak-ng", "-v", voice, "-s", "150", "--stdout", text], check=True, capture_output=True
    ).stdout
    samples, rate = soundfile.read(io.BytesIO(wave), dtype="float32")
    samples = soxr.resample(samples, rate, 16_000)
    soundfile.write(target, samples, 16_000, format="OGG", subtype="OPUS")


def make_shapes(train: Path) -> None:
    """The first pictures of easy-vqa with all their questions."""
    questions = json.loads((train / "questions.json").read_text())
    for number in range(QUESTIONS):
        picture = (train / "images" / f"{number}.png").read_bytes()
        (HERE / "shapes" / "images" / f"{number}.png").write_bytes(picture)
    kept = [question for question in questions if question[2] < QUESTIONS]
    (HERE / "shapes" / "questions.json").write_text(json.dumps(kept, indent=0) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
