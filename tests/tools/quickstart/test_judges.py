"""Judges learn from true media, and judge by captions."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmfusion.data.converters.text_to_media import TextToMedia
from mmfusion.data.source import Source
from mmfusion.data.writer import ShardWriter
from mmfusion.tools.quickstart.judges import (
    JUDGES,
    MotionJudge,
    ShapeJudge,
    SmallJudge,
    SoundJudge,
    train_judge,
)
from mmfusion.tools.quickstart.pictures import MOTIONS, encode_mp4
from mmfusion.training.generator_fits import Effort
from mmfusion.types import Media

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def square(color: str, shape: str, corner: int = 8) -> bytes:
    pixels = np.full((32, 32, 3), 240, np.uint8)
    wide = 16 if shape == "rectangle" else 4
    pixels[corner : corner + 6, corner : corner + wide] = COLORS[color]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("shapes")
    with ShardWriter(str(folder / "train-%06d.tar")) as writer:
        for i in range(24):
            color, shape = ("red", "blue")[i % 2], ("rectangle", "circle")[i // 2 % 2]
            text = f"A {color} {shape}.".encode()
            writer.write(f"{i:02d}", {"png": square(color, shape, i % 9), "txt": text})
    converter = TextToMedia(prompts={"image": ["{caption}"]})
    return Source(str(folder / "train-*.tar"), converter)


def test_a_judge_looks_where_its_weights_are() -> None:
    judge = ShapeJudge("")
    tensors = {"pixels": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}
    assert all(found.is_meta for found in judge.to("meta").outputs(tensors))


@pytest.fixture(scope="module")
def judge(source: Source, tmp_path_factory: pytest.TempPathFactory) -> ShapeJudge:
    file = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    train_judge(ShapeJudge(str(file)), source, Effort(60, 8, 5e-3), file)
    judge = ShapeJudge(str(file))
    judge.build()
    return judge


def test_a_judge_tells_true_media(judge: ShapeJudge, source: Source) -> None:
    media = [source[i].targets[0] for i in range(len(source))]
    judge.reset()
    judge.update(media, media)
    assert judge.compute()["right/all"] > 0.9


def test_made_media_are_judged_by_the_caption_of_the_true_ones(judge: ShapeJudge) -> None:
    wanted = [Media("image", square("red", "rectangle"), "png", caption="A red rectangle.")]
    made = [Media("image", square("blue", "rectangle"), "png")]
    judge.reset()
    judge.update(made, wanted)
    found = judge.compute()
    assert (found["right/color"], found["right/shape"], found["right/all"]) == (0, 1, 0)


@pytest.mark.parametrize("kind", [ShapeJudge, SoundJudge])
def test_media_are_disturbed_where_they_are(kind: type[SmallJudge]) -> None:
    seen = torch.zeros(2, kind.channels, 8, 64, device="meta")  # as strict as another device
    assert kind("").disturbed(seen).device == seen.device


def test_the_same_training_gives_the_same_judge(source: Source, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for file in files:
        torch.manual_seed(int(file.stem))
        train_judge(ShapeJudge(str(file)), source, Effort(3, 8, 5e-3), file)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("kind", "caption", "labels"),
    [
        (ShapeJudge, "A teal triangle.", {"color": "teal", "shape": "triangle"}),
        (ShapeJudge, "A goat.", None),
        (SoundJudge, "Ocean waves.", {"sound": "ocean waves"}),
        (SoundJudge, "A cough.", None),
        (MotionJudge, "A goat moves up.", {"motion": "up"}),
        (MotionJudge, "A goat.", None),
    ],
)
def test_labels_are_read_from_captions(kind: type, caption: str, labels: object) -> None:
    assert kind("x").labels(Media("image", b"", "png", caption=caption)) == labels


def test_sounds_and_clips_go_through_the_networks() -> None:
    file = io.BytesIO()
    seconds = np.arange(16000) / 16000
    soundfile.write(file, 0.5 * np.sin(6000 * seconds), 16000, format="FLAC")
    (heard,) = SoundJudge("x").eval().classify([Media("audio", file.getvalue(), "flac")])
    assert set(heard) == {"sound"}
    clip = encode_mp4([Image.new("RGB", (64, 64), "red")] * 12, 6)
    (seen,) = MotionJudge("x").eval().classify([Media("video", clip, "mp4")])
    assert seen["motion"] in MOTIONS
    hiss = SoundJudge("x").disturbed(torch.zeros(2, 1, 96, 64))
    assert hiss.shape == (2, 1, 96, 64)
    assert (hiss >= 0).all()


def test_there_is_a_judge_for_each_generator() -> None:
    assert set(JUDGES) == {"image", "audio", "video"}
