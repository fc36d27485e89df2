"""A run over a shard that holds, among good samples, everything that real data are spoilt by."""

from __future__ import annotations

import io
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer, normalizers

from mmfusion.data.writer import ShardWriter
from mmfusion.training.loggers import read_metrics
from mmfusion.training.run import RunDirectory
from tests.recipes.tiny_cache import encoders
from tests.training.tiny import HERE, fit, recorded, write_recipe

WORDLESS = "\N{ZERO WIDTH SPACE}"
"""Text that the tokenizer makes no token of."""

PACK_TOKENS = 48


def good_samples(assets: Path) -> dict[str, dict[str, bytes]]:
    files = {"jpg": "pictures", "mp4": "videos", "ogg": "speech"}
    found = {}
    for extension, folder in files.items():
        for path in sorted((assets / folder).glob(f"*.{extension}"))[:4]:
            text = f"w{len(found)} w1 w2".encode()
            found[f"{extension}-{path.stem}"] = {extension: path.read_bytes(), "txt": text}
    return found


def bad_samples(assets: Path) -> dict[str, tuple[str, dict[str, bytes]]]:
    """By key, the reason it is to be left out for, and the record."""
    picture = (assets / "pictures" / "apple.jpg").read_bytes()
    text, media = {"txt": b"w1 w2"}, {"jpg": picture}
    return {
        "half-a-jpeg": ("corrupt_image", {**text, "jpg": picture[: len(picture) // 2]}),
        "no-jpeg": ("corrupt_image", {**text, "jpg": b"\xff\xd8\xff but no more"}),
        "no-frame": ("empty_video", {**text, "mp4": video_without_frames()}),
        "silence": ("silent_audio", {**text, "wav": sound(np.zeros(8000))}),
        "no-sound": ("empty_audio", {**text, "wav": sound(np.zeros(0))}),
        "no-byte": ("corrupt_audio", {**text, "ogg": b""}),
        "no-text": ("empty_text", {**media, "txt": b" \n"}),
        "no-token": ("nothing_trained", {**media, "txt": WORDLESS.encode()}),
        "too-long": ("too_long", {**media, "txt": b"w1 " * PACK_TOKENS}),
    }


def records_of(assets: Path) -> dict[str, dict[str, bytes]]:
    bad = {key: record for key, (_, record) in bad_samples(assets).items()}
    return {**good_samples(assets), **bad}


def sound(samples: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="WAV")
    return file.getvalue()


def video_without_frames() -> bytes:
    file = io.BytesIO()
    movflags = {"movflags": "frag_keyframe+empty_moov"}
    with av.open(file, "w", format="mp4", options=movflags) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture(scope="module")
def keys(assets: Path) -> list[str]:
    """Of all samples, in the shards' order."""
    return sorted(records_of(assets), key=lambda key: zlib.crc32(key.encode()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, assets: Path, keys: list[str]) -> RunDirectory:
    folder = tmp_path_factory.mktemp("bad")
    records = records_of(assets)
    with ShardWriter(str(folder / "mixed-%06d.tar"), max_samples=7) as writer:
        for key in keys:
            writer.write(key, records[key])
    converter = {
        "class_path": "mmfusion.data.converters.caption.Caption",
        "init_args": {"end": ""},
    }
    linear = {"class_path": "mmfusion.models.projectors.linear.Linear"}
    recipe = write_recipe(
        folder,
        trainer__max_steps=100,
        trainer__callbacks=[{"class_path": f"{HERE}.Recorder", "init_args": {"folder": "seen"}}],
        model__encoders=encoders(folder),
        model__input_projectors=dict.fromkeys(("image", "video", "audio"), linear),
        model__schedule={"warmup_steps": 0},
        data={
            "sources": {"mixed": {"shards": str(folder / "mixed-*.tar"), "converter": converter}},
            "pack_tokens": PACK_TOKENS,
            "packs_per_step": 2,
            "lanes": 2,
            "epochs": 1,
            "max_bad_fraction": 0.5,
        },
    )
    own = folder / "llm" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(own))
    tokenizer.normalizer = normalizers.Replace(WORDLESS, "")
    tokenizer.save(str(own))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return fit(recipe)


def test_the_run_finishes(run: RunDirectory) -> None:
    assert json.loads((run.path / "status.json").read_text())["state"] == "finished"


def test_every_bad_sample_is_listed_with_its_reason_and_no_other(
    run: RunDirectory, assets: Path, keys: list[str]
) -> None:
    rows = [json.loads(line) for line in (run.path / "quarantine.jsonl").read_text().splitlines()]
    expected = sorted((key, reason) for key, (reason, _) in bad_samples(assets).items())
    assert sorted((row["key"], row["reason"]) for row in rows) == expected
    for row in rows:
        assert (row["source"], row["epoch"], row["index"]) == ("mixed", 0, keys.index(row["key"]))
        assert row["shard"].endswith(f"mixed-{row['index'] // 7:06d}.tar")


def test_they_are_counted_by_reason(run: RunDirectory, assets: Path) -> None:
    last = read_metrics(run.path / "metrics.csv")[-1]
    bad = bad_samples(assets)
    for reason, count in Counter(reason for reason, _ in bad.values()).items():
        assert last[f"data/bad/{reason}"] == count
    assert last["data/mixed/bad"] == len(bad)
    assert last["data/mixed/samples"] == len(good_samples(assets))
    said = (run.path / "attempts/0001/log.txt").read_text()
    assert f"{len(bad)} samples were left out ({{'mixed': {{" in said


def test_every_good_sample_was_trained_once(
    run: RunDirectory, assets: Path, keys: list[str]
) -> None:
    rows = recorded(run.path.parent / "seen")
    seen = [keys[index] for row in rows for _, _, index in row["samples"]]
    assert sorted(seen) == sorted(good_samples(assets))
