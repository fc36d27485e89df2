"""Video: from file bytes to chosen frames (T, 3, H, W) uint8.

One pass over the packets, without decoding, gives the time of every frame and where the keyframes
are. So frames are chosen exactly, also where their rate varies, and the reader seeks only where a
keyframe lies between it and the next wanted frame: at worst as fast as reading everything, which
one seek a frame is not. Sizes and lengths are checked before anything is decoded.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from mmfusion.processing.containers import DAMAGE, open_container
from mmfusion.types import DataError

MAX_PIXELS = 50_000_000
"""Pixels H*W of a frame above which a video is refused."""

MAX_SECONDS = 4 * 3600.0
"""Seconds above which a video is refused."""

MAX_FRAMES = 1_000_000
"""Stored frames above which a video is refused."""

MAX_DECODED_PIXELS = 1_000_000_000
"""Pixels T*H*W above which the chosen frames are refused."""


@dataclass(frozen=True)
class VideoInfo:
    """What the headers say.

    Attributes:
        num_frames: frames that are shown.
        fps: mean frames a second.
        seconds: from the first frame to the end of the last.
        height, width: as stored, before a rotation.
    """

    num_frames: int
    fps: float
    seconds: float
    height: int
    width: int


@dataclass(frozen=True)
class _Frames:
    """The frames of a stream in the order they are shown.

    Attributes:
        pts: their times in units of ``time_base``, strictly rising.
        end: when the last one ends.
        keys: (pts, dts) of the keyframes, rising.
    """

    pts: list[int]
    end: int
    keys: list[tuple[int, int]]
    time_base: float

    def seconds(self, pts: int) -> float:
        return (pts - self.pts[0]) * self.time_base


def video_info(data: bytes, format: str = "") -> VideoInfo:
    """Frames, rate, length and size, without decoding.

    Raises:
        DataError: see :func:`decode_video`.
    """
    with _opened(data, format) as (container, stream):
        frames = _scan(container, stream, format)
        seconds = frames.seconds(frames.end)
        return VideoInfo(
            num_frames=len(frames.pts),
            fps=len(frames.pts) / seconds,
            seconds=seconds,
            height=stream.codec_context.height,
            width=stream.codec_context.width,
        )


def count_frames(
    data: bytes,
    format: str = "",
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
) -> int:
    """T of :func:`decode_video` with the same arguments, without decoding."""
    with _opened(data, format) as (container, stream):
        frames = _scan(container, stream, format)
        return len(_choose(frames, format, num_frames, fps, max_frames, start, end))


def decode_video(
    data: bytes,
    format: str = "",
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
) -> Tensor:
    """Decode some frames of a video, or of a span of it; turned upright.

    Args:
        data: the file.
        format: its extension, for messages; the format itself is read from the data.
        num_frames: as many frames, spread evenly from the first to the last (repeated where the
            video has fewer).
        fps: instead, the frame shown at each 1/fps seconds.
        max_frames: with ``fps``, spread this many evenly where there would be more.
        start: seconds from the first frame; None is the start.
        end: seconds from the first frame; None is the end.

    Returns:
        (T, 3, H, W) uint8.

    Raises:
        DataError: ``corrupt_video``, ``no_video_stream``, ``empty_video`` (no frame, or none in the
            span), ``bad_span``, ``too_many_pixels``, ``too_many_frames``, ``too_long_video``.
    """
    with _opened(data, format) as (container, stream):
        frames = _scan(container, stream, format)
        indices = _choose(frames, format, num_frames, fps, max_frames, start, end)
        wanted = sorted(set(indices))
        size = stream.codec_context.height * stream.codec_context.width
        if size * len(indices) > MAX_DECODED_PIXELS:  # also where one is shown many times
            raise DataError(
                "too_many_pixels",
                f"{len(indices)} frames of {size} pixels are more than {MAX_DECODED_PIXELS} pixels "
                "in all; choose fewer frames, or shrink the video.",
            )
        decoded = _read(container, stream, frames, [frames.pts[i] for i in wanted], format)
    pictures = dict(zip(wanted, decoded, strict=True))
    if len({picture.shape for picture in decoded}) > 1:
        raise _corrupt(format, "the size of its frames changes")
    stacked = np.stack([pictures[i] for i in indices])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)


@contextmanager
def _opened(data: bytes, format: str) -> Iterator[tuple[Any, Any]]:
    """The container and its film; FFmpeg's errors become data errors."""
    try:
        with open_container(data) as container:
            yield container, _film(container, format)
    except DAMAGE as error:
        raise _corrupt(format, error) from error


def _film(container: Any, format: str) -> Any:
    """The first video stream that is not a cover picture."""
    cover = av.stream.Disposition.attached_pic
    films = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not films:
        if not len(container.streams):
            raise DataError("empty_video", f"the {format} file holds no stream at all.")
        kinds = [stream.type for stream in container.streams]
        raise DataError("no_video_stream", f"the {format} file holds {kinds} and no film.")
    context = films[0].codec_context
    if context is None:
        raise _corrupt(format, "no decoder for it")
    if context.height * context.width > MAX_PIXELS:
        raise DataError(
            "too_many_pixels",
            f"frames have {context.height} x {context.width} pixels; at most {MAX_PIXELS} are "
            "decoded. Shrink the video.",
        )
    context.thread_count = 1
    return films[0]


def _scan(container: Any, stream: Any, format: str) -> _Frames:
    """One pass over the packets."""
    pts, keys, end, count = [], [], 0, 0
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        count += 1
        if count > MAX_FRAMES:
            raise DataError("too_many_frames", f"the video has more than {MAX_FRAMES} frames.")
        if packet.pts is None:
            raise _corrupt(format, "a frame has no time; put it into MP4 or MKV")
        if packet.is_keyframe:
            keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        if not packet.is_discard:
            pts.append(packet.pts)
            end = max(end, packet.pts + (packet.duration or 0))
    if not pts or not keys:
        raise DataError("empty_video", f"the {format} video has no frame.")
    if count < stream.frames * 0.98:
        raise _corrupt(format, f"{count} frames where its header promises {stream.frames}")
    pts = sorted(set(pts))
    if end <= pts[-1]:
        rate = float(stream.average_rate or 25)
        end = pts[-1] + max(round(1 / rate / stream.time_base), 1)
    frames = _Frames(pts, end, sorted(keys), float(stream.time_base))
    if frames.seconds(end) > MAX_SECONDS:
        raise DataError(
            "too_long_video",
            f"the video lasts {frames.seconds(end):.0f} s; at most {MAX_SECONDS:.0f} s are read.",
        )
    return frames


def _choose(
    frames: _Frames,
    format: str,
    num_frames: int | None,
    fps: float | None,
    max_frames: int | None,
    start: float | None,
    end: float | None,
) -> list[int]:
    """Indices of the chosen frames, rising; some twice where the video has too few."""
    if (num_frames is None) == (fps is None):
        raise ValueError(f"give num_frames or fps; got num_frames={num_frames}, fps={fps}.")
    length = frames.seconds(frames.end)
    begin, stop = start or 0.0, math.inf if end is None else end
    if not 0 <= begin < stop:
        raise DataError(
            "bad_span", f"got the span {start} s to {end} s; expected 0 <= start < end."
        )
    if begin >= length:
        raise DataError(
            "empty_video", f"the {format} video of {length:.2f} s has no frame after {begin} s."
        )
    stop = min(stop, length)
    first, last = _shown_at(frames, begin), _last_before(frames, stop)
    if fps is not None:
        wanted = max(math.ceil((stop - begin) * fps - 1e-6), 1)
        if wanted > MAX_FRAMES and max_frames is None:
            raise DataError(
                "too_many_frames", f"{wanted} frames are asked for; at most {MAX_FRAMES} are given."
            )
        if max_frames is None or wanted <= max_frames:
            return [max(_shown_at(frames, begin + k / fps), first) for k in range(wanted)]
        num_frames = max_frames
    assert num_frames is not None
    return np.linspace(first, max(first, last), num_frames).round().astype(int).tolist()


def _shown_at(frames: _Frames, seconds: float) -> int:
    """The last frame that starts at this time or before (within a millionth of a second)."""
    at = frames.pts[0] + math.floor((seconds + 1e-6) / frames.time_base)
    return max(bisect.bisect_right(frames.pts, at) - 1, 0)


def _last_before(frames: _Frames, seconds: float) -> int:
    """The last frame that starts before this time."""
    at = frames.pts[0] + math.ceil((seconds - 1e-6) / frames.time_base)
    return bisect.bisect_left(frames.pts, at) - 1


def _read(
    container: Any, stream: Any, frames: _Frames, wanted: Sequence[int], format: str
) -> list[np.ndarray[Any, Any]]:
    """Frames of these times, (H, W, 3) each."""
    pictures: list[np.ndarray[Any, Any]] = []
    reader: Iterator[Any] = iter(())
    position = -math.inf
    for pts in wanted:
        key = frames.keys[max(bisect.bisect_right(frames.keys, (pts, pts)) - 1, 0)]
        if key[0] > position:
            # By its decoding time: a container that indexes those never lands behind it.
            container.seek(min(key), stream=stream)
            reader = container.decode(stream)
        frame = _skip_to(reader, pts)
        if frame is None:
            container.seek(min(*frames.keys[0], frames.pts[0]), stream=stream)
            reader = container.decode(stream)
            frame = _skip_to(reader, pts)
        if frame is None or frame.is_corrupt:
            raise _corrupt(format, f"the frame at {frames.seconds(pts):.2f} s is missing")
        position = pts
        pictures.append(_upright(frame))
    return pictures


def _skip_to(reader: Iterator[Any], pts: int) -> Any:
    """The frame of this time; None where the reader has passed it or ends."""
    for frame in reader:
        if frame.pts is not None and frame.pts >= pts:
            return frame if frame.pts == pts else None
    return None


def _upright(frame: Any) -> np.ndarray[Any, Any]:
    """RGB (H, W, 3), with the rotation that the file asks for."""
    picture = frame.to_ndarray(format="rgb24")
    return np.rot90(picture, round(frame.rotation / 90) % 4)


def _corrupt(format: str, error: BaseException | str) -> DataError:
    return DataError("corrupt_video", f"the {format} video does not decode ({error}).")
