"""EfficientNet-Lite: the processor against PIL, the pooling against loops, the loading."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmfusion.models.encoders.efficientnet import (
    EfficientNetLite,
    EfficientNetLiteVideo,
    white_square,
)
from mmfusion.processing.videos import decode_video, video_info
from mmfusion.types import Media


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint as efficientnet_lite_pytorch writes it, classifier included."""
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(0)
    net = EfficientNet.from_name("efficientnet-lite0")
    path = tmp_path_factory.mktemp("efficientnet")
    save_file(net.state_dict(), path / "model.safetensors")
    return path


def built(encoder: EfficientNetLite) -> EfficientNetLite:
    encoder.build()
    encoder.requires_grad_(False).train()
    return encoder


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def media(image: Image.Image) -> Media:
    file = io.BytesIO()
    image.save(file, "png")
    return Media("image", file.getvalue(), "png")


@pytest.mark.parametrize("size", [(300, 500), (64, 64), (90, 31)])
def test_pictures_are_squared_on_white_and_scaled_as_pil_does(
    folder: Path, size: tuple[int, int]
) -> None:
    image = picture(*size)
    side = max(size)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(image, ((side - size[1]) // 2, (side - size[0]) // 2))
    expected = np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    found = EfficientNetLite(str(folder)).media_processor()(media(image))["pixels"]
    assert found.dtype == torch.uint8
    difference = np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= 2  # torch and PIL round at other places
    assert (difference > 0).mean() < 0.02


def test_transparent_pixels_become_white(folder: Path) -> None:
    clear = Image.new("RGBA", (50, 50), (10, 20, 30, 0))
    pixels = EfficientNetLite(str(folder)).media_processor()(media(clear))["pixels"]
    assert (pixels == 255).all()


def test_grid_and_global_token_are_means_of_the_map(folder: Path) -> None:
    encoder = built(EfficientNetLite(str(folder), grid=2, global_token=True))
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        cells = encoder.net.extract_features((pixels.float() - 127) / 128)
        found = encoder({"pixels": pixels})
    assert cells.shape == (2, 1280, 7, 7)
    parts = [slice(0, 4), slice(3, 7)]
    expected = [cells[:, :, rows, columns].mean((2, 3)) for rows in parts for columns in parts]
    expected.append(cells.mean((2, 3)))
    torch.testing.assert_close(found, torch.stack(expected, 1))
    assert encoder.media_processor().num_features(media(picture(9, 9))) == 5


def test_without_a_grid_every_cell_is_a_feature_row_by_row(folder: Path) -> None:
    encoder = built(EfficientNetLite(str(folder)))
    pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        cells = encoder.net.extract_features((pixels.float() - 127) / 128)
        torch.testing.assert_close(encoder({"pixels": pixels})[0, 9], cells[0, :, 1, 2])
    assert encoder.media_processor().num_features(media(picture(9, 9))) == 49


@pytest.mark.parametrize("time_steps", [0, 2])
def test_video_features_come_frame_by_frame(folder: Path, time_steps: int) -> None:
    image = EfficientNetLite(str(folder), grid=2, global_token=True)
    video = EfficientNetLiteVideo(
        str(folder), frames=4, grid=2, global_token=True, time_steps=time_steps
    )
    built(image)
    built(video)
    pixels = torch.randint(0, 256, (1, 4, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        frames = torch.stack([image({"pixels": pixels[:, t]}) for t in range(4)], 1)
        found = video({"pixels": pixels})
    if time_steps:
        frames = torch.stack([frames[:, :2].mean(1), frames[:, 2:].mean(1)], 1)
    torch.testing.assert_close(found, frames.flatten(1, 2), atol=1e-5, rtol=1e-5)
    processor = video.media_processor()
    assert processor.num_features(Media("video", b"", "mp4")) == found.shape[1]


def test_a_real_clip_becomes_its_frames(folder: Path, assets: Path) -> None:
    file = min((assets / "videos").glob("*.mp4"))
    processor = EfficientNetLiteVideo(str(folder), frames=3).media_processor()
    item = processor(Media("video", file.read_bytes(), "mp4"))
    assert item["pixels"].shape == processor.idle()["pixels"].shape == (3, 3, 224, 224)
    assert item["pixels"].float().std() > 1


def test_at_a_fixed_rate_longer_clips_get_more_features(folder: Path, assets: Path) -> None:
    data = min((assets / "videos").glob("*.mp4")).read_bytes()
    seconds = video_info(data).seconds
    clips = [Media("video", data, "mp4", end=end) for end in (seconds, seconds / 2, 0.01)]
    video = EfficientNetLiteVideo(str(folder), frames=3, grid=2, fps=4 / seconds)
    built(video)
    processor = video.media_processor()
    items = [processor(clip) for clip in clips]
    counts = [item["num_features"].item() for item in items]
    assert counts == [3 * 4, 2 * 4, 1 * 4], "at most 3 frames"
    assert counts == [processor.num_features(clip) for clip in clips]
    wanted = decode_video(data, "mp4", fps=4 / seconds, end=seconds / 2)
    assert torch.equal(items[1]["pixels"], white_square(wanted, 224))
    with torch.no_grad():
        together = video(processor.collate(items))
        alone = [video(processor.collate([item]))[0] for item in items]
    assert together.shape == (3, 12, 1280)
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found[: len(expected)], expected, atol=1e-5, rtol=1e-5)
        assert not found[len(expected) :].any()
    assert video(processor.collate([processor.idle()])).shape == (1, 4, 1280)


@pytest.mark.parametrize(
    "options", [{"fps": 0.0}, {"fps": float("inf")}, {"fps": 2.0, "time_steps": 2}]
)
def test_a_rate_that_cannot_be_meant_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="fps is"):
        EfficientNetLiteVideo("", **options)


def test_batch_statistics_stay_where_they_are_in_a_trained_encoder(folder: Path) -> None:
    """They would take in blank idle images, and differ from rank to rank."""
    encoder = EfficientNetLite(str(folder), image_size=32)
    encoder.build()
    before = encoder.net._bn0.running_mean.clone()
    encoder.train()({"pixels": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)})
    assert torch.equal(encoder.net._bn0.running_mean, before)


def test_a_frozen_encoder_stays_in_evaluation_mode(folder: Path) -> None:
    encoder = EfficientNetLite(str(folder))
    encoder.build()
    encoder.train()
    assert encoder.net.training
    encoder.requires_grad_(False)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    before = encoder.net._bn0.running_mean.clone()
    encoder({"pixels": torch.zeros(1, 3, 224, 224, dtype=torch.uint8)})
    assert torch.equal(encoder.net._bn0.running_mean, before)


def test_every_weight_is_loaded(folder: Path) -> None:
    encoder = EfficientNetLite(str(folder))
    encoder.build()
    stored = load_file(folder / "model.safetensors")
    for name, value in encoder.net.state_dict().items():
        assert torch.equal(value, stored[name])


def test_a_missing_weight_or_file_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is not there"):
        EfficientNetLite(str(tmp_path)).build()
    weights = load_file(folder / "model.safetensors")
    del weights["_conv_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 weights are missing \(\['_conv_head.weight'\]\)"):
        EfficientNetLite(str(tmp_path)).build()


@pytest.mark.parametrize("options", [{"grid": 8}, {"grid": -1}, {"variant": "efficientnet-b0"}])
def test_options_out_of_range_are_refused(folder: Path, options: dict) -> None:
    with pytest.raises(ValueError, match=r"grid is|variant"):
        EfficientNetLite(str(folder), **options)


@pytest.mark.slow
def test_real_weights_tell_pictures_apart(assets: Path, real_weights: dict[str, Path]) -> None:
    folder = real_weights["efficientnet-lite0"]
    encoder = built(EfficientNetLite(str(folder), grid=1))
    processor = encoder.media_processor()
    files = sorted((assets / "pictures").glob("*.jpg"))[:4]
    items = [processor(Media("image", file.read_bytes(), "jpg")) for file in files]
    features = torch.nn.functional.normalize(encoder(processor.collate(items))[:, 0], dim=-1)
    assert features.isfinite().all()
    assert (features @ features.T - torch.eye(4)).max() < 0.95
