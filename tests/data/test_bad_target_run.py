"""A run over answers whose media are spoilt, or lack the caption that they are compared with,
beside good ones of all modalities.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmfusion.data.writer import ShardWriter
from mmfusion.training.loggers import read_metrics
from mmfusion.training.run import RunDirectory
from tests.data.test_bad_media_run import sound, video_without_frames
from tests.models.generators.families import clip
from tests.models.generators.tiny import save_stable_diffusion, save_text_to_video_sd
from tests.models.generators.tiny_sound import save_audio_ldm
from tests.training.pictures import FULL, NEW, NEXT_TOKEN, OUTPUT, SMALL, objective
from tests.training.three_stages import picture, tone
from tests.training.tiny import HERE, fit, recorded, write_recipe

GENERATORS = {
    "image": ("stable_diffusion.StableDiffusion", save_stable_diffusion, {}),
    "audio": ("audio_ldm.AudioLDM", save_audio_ldm, {"window": 128}),
    "video": ("text_to_video_sd.TextToVideoSD", save_text_to_video_sd, {"num_frames": 2}),
}
EXTENSIONS = {"image": "png", "audio": "wav", "video": "mp4"}


def record(modality: str, data: bytes | None, caption: str | None = "a") -> dict[str, bytes]:
    """A request that is answered by a medium; None: the file is not in the record."""
    name = f"0.{EXTENSIONS[modality]}"
    answer = {"type": modality, modality: name} | ({} if caption is None else {"caption": caption})
    turns = [
        {"role": "user", "content": "w31 w1"},
        {"role": "assistant", "content": [answer]},
    ]
    text = {"json": json.dumps({"messages": turns}).encode()}
    return text if data is None else {name: data, **text}


def good_samples() -> dict[str, dict[str, bytes]]:
    return {
        **{f"picture-{word}": record("image", picture(word)) for word in ("w1", "w2")},
        **{f"tone-{word}": record("audio", tone(word)) for word in ("w1", "w2")},
        "clip": record("video", clip().data),
        "clip-without-caption": record("video", clip(1).data, None),  # nothing compares it
    }


def bad_samples() -> dict[str, tuple[str, dict[str, bytes]]]:
    """By key, the reason it is to be left out for, and the record."""
    whole = picture("w1")
    return {
        "half-a-png": ("corrupt_image", record("image", whole[: len(whole) // 2])),
        "no-png": ("corrupt_image", record("image", b"not a picture")),
        "no-caption": ("no_caption", record("image", whole, None)),
        "blank-caption": ("no_caption", record("audio", tone("w1"), " ")),
        "silence": ("silent_audio", record("audio", sound(np.zeros(8000)))),
        "no-byte": ("corrupt_audio", record("audio", b"")),
        "no-clip": ("corrupt_video", record("video", b"not a clip")),
        "no-frame": ("empty_video", record("video", video_without_frames())),
        "no-file": ("media_count", record("image", None)),
    }


def parts(home: Path) -> dict[str, Any]:
    generators = {}
    for modality, (name, save, options) in GENERATORS.items():
        path = save(home / modality)
        class_path = f"mmfusion.models.generators.{name}"
        generators[modality] = {"class_path": class_path, "init_args": {"path": path, **options}}
    projector = {"class_path": OUTPUT, "init_args": SMALL}
    return {
        "model__encoders": {},
        "model__input_projectors": {},
        "model__signal_tokens": dict.fromkeys(GENERATORS, 2),
        "model__generators": generators,
        "model__output_projectors": dict.fromkeys(GENERATORS, projector),
        "model__tuning": {"output_projectors": FULL, "llm": NEW},
        "model__objectives": {
            "next_token": NEXT_TOKEN,
            "align_image": objective("align"),
            "align_audio": objective("align", modality="audio", distance="cosine"),
            "denoise_video": objective("denoise", modality="video"),
        },
        "model__schedule": {"warmup_steps": 0},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    home = tmp_path_factory.mktemp("bad_targets")
    records = good_samples() | {key: made for key, (_, made) in bad_samples().items()}
    with ShardWriter(str(home / "asked-%06d.tar")) as writer:
        for key in keys():
            writer.write(key, records[key])
    converter = {"class_path": "mmfusion.data.converters.conversation.Conversation"}
    recipe = write_recipe(
        home,
        **parts(home),
        trainer__max_steps=100,
        trainer__callbacks=[
            {"class_path": f"{HERE}.Recorder", "init_args": {"folder": str(home / "seen")}}
        ],
        data={
            "sources": {"asked": {"shards": f"{home}/asked-*.tar", "converter": converter}},
            "pack_tokens": 64,
            "packs_per_step": 1,
            "lanes": 1,
            "epochs": 1,
            "max_bad_fraction": 0.7,
        },
    )
    return fit(recipe)


def keys() -> list[str]:
    """Of all samples, in the shard's order: good and bad in turn."""
    return sorted([*good_samples(), *bad_samples()])


def test_every_bad_answer_is_listed_with_its_reason_and_no_other(run: RunDirectory) -> None:
    assert json.loads((run.path / "status.json").read_text())["state"] == "finished"
    rows = [json.loads(line) for line in (run.path / "quarantine.jsonl").read_text().splitlines()]
    expected = sorted((key, reason) for key, (reason, _) in bad_samples().items())
    assert sorted((row["key"], row["reason"]) for row in rows) == expected


def test_they_are_counted_by_reason(run: RunDirectory) -> None:
    last, bad = read_metrics(run.path / "metrics.csv")[-1], bad_samples()
    for reason, count in Counter(reason for reason, _ in bad.values()).items():
        assert last[f"data/bad/{reason}"] == count
    assert last["data/asked/bad"] == len(bad)


def test_every_good_answer_was_trained_once(run: RunDirectory) -> None:
    seen = [
        keys()[index]
        for row in recorded(run.path.parent / "seen")
        for _, _, index in row["samples"]
    ]
    assert sorted(seen) == sorted(good_samples())
    losses = {key for row in read_metrics(run.path / "metrics.csv") for key in row}
    assert {"train/align_image", "train/align_audio", "train/denoise_video"} <= losses
