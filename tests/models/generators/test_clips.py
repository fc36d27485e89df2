"""Clips on their way in and out of a generator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mmfusion.models.generators.clips import ClipProcessor, as_mp4, covering
from mmfusion.models.generators.pixels import checked_sides
from mmfusion.processing.images import center_crop, resize
from mmfusion.processing.videos import decode_video, video_info
from mmfusion.types import DataError, Media
from tests.models.generators.families import clip


def greys(pixels_T3HW: Tensor) -> list[int]:
    """Which of ``clip``'s frames are shown."""
    return [round((float(frame.float().mean()) - 22) / 25) for frame in pixels_T3HW]


@pytest.mark.parametrize(
    ("fps", "span", "expected"),
    [
        (8.0, (None, None), [0, 1, 2, 3]),
        (4.0, (None, None), [0, 2, 4, 6]),
        (8.0, (0.25, None), [2, 3, 4, 5]),
        (8.0, (0.75, None), [6, 7, 7, 7]),
        (8.0, (0.0, 0.25), [0, 1, 1, 1]),
        (16.0, (None, None), [0, 0, 1, 1]),
    ],
)
def test_frames_are_taken_at_the_rate_and_the_last_one_stays(
    fps: float, span: tuple[float | None, float | None], expected: list[int]
) -> None:
    media = replace(clip(), start=span[0], end=span[1])
    pixels = ClipProcessor(16, 32, 4, fps)(media)["pixels"]
    assert pixels.shape == (4, 3, 16, 32)
    assert greys(pixels) == expected


def test_frames_cover_the_size_and_are_cut_to_their_middle() -> None:
    rows = np.linspace(0, 250, 64).astype(np.uint8)
    frame = torch.from_numpy(np.broadcast_to(rows[None, :, None], (3, 64, 32)).copy())
    media = as_mp4(frame[None].expand(4, -1, -1, -1) / 255, 8)
    (found,) = ClipProcessor(32, 32, 1, 8.0)(media)["pixels"]
    expected = frame[:, 16:48].float()
    assert (found.float() - expected).abs().mean() < 4


@pytest.mark.parametrize(
    ("of", "to"),
    [((144, 250), (48, 80)), ((250, 144), (48, 80)), ((30, 40), (64, 48)), ((32, 48), (32, 48))],
)
def test_frames_are_what_the_middle_of_them_scaled_as_a_whole_is(
    of: tuple[int, int], to: tuple[int, int]
) -> None:
    """To a pixel, of theirs or of the result: what is shown says where it was."""
    places = torch.meshgrid(torch.arange(of[0]), torch.arange(of[1]), indexing="ij")
    frames = torch.stack([*places, places[0]]).to(torch.uint8)[None]
    scale = max(to[0] / of[0], to[1] / of[1])
    whole = resize(frames, (max(to[0], int(of[0] * scale)), max(to[1], int(of[1] * scale))))
    found, expected = covering(frames, *to).int(), center_crop(whole, to).int()
    assert (found - expected).abs().max() <= max(1, 1 / scale)


def test_narrow_frames_are_cut_in_little_memory() -> None:
    """Scaled as a whole one would have 1.4e9 pixels."""
    frames = torch.zeros(1, 3, 16, 100_000, dtype=torch.uint8)
    frames[..., 49_990:50_010] = 200
    for found in (covering(frames, 480, 128), covering(frames.mT, 128, 480).mT):
        assert found.shape == (1, 3, 480, 128)
        assert (found == 200).all()


def test_clips_are_written_as_they_are() -> None:
    frames = torch.linspace(0, 1, 6).view(6, 1, 1, 1).expand(6, 3, 32, 48)
    media = as_mp4(frames, 12.5)
    assert (media.modality, media.format) == ("video", "mp4")
    info = video_info(media.data)
    assert (info.num_frames, info.fps, info.height, info.width) == (6, 12.5, 32, 48)
    shown = decode_video(media.data, num_frames=6).float()
    assert (shown - frames * 255).abs().max() < 6


def test_corrupt_clips_and_odd_sides_are_refused() -> None:
    broken = Media("video", clip().data[:300], "mp4")
    with pytest.raises(DataError):
        ClipProcessor(16, 16, 2, 8.0)(broken)
    for sides in ({"width": 32, "height": 18}, {"height": 0}, {"height": -16}):
        with pytest.raises(ValueError, match=f"height is {sides['height']}; expected a multiple"):
            checked_sides(16, **sides)
    for frames, fps in ((0, 8.0), (2, 0.0), (2, float("nan"))):
        with pytest.raises(ValueError, match=f"num_frames is {frames}, fps {fps}; expected more"):
            ClipProcessor(16, 16, frames, fps)
