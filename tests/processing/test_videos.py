from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mmfusion.processing import videos
from mmfusion.processing.videos import count_frames, decode_video, video_info
from mmfusion.types import DataError

HEIGHT, WIDTH = 48, 64


def film(
    num_frames: int = 90,
    fps: int = 30,
    gop: int = 30,
    format: str = "mp4",
    codec: str = "libx264",
    pts: list[int] | None = None,
    options: dict[str, str] | None = None,
    movflags: str = "",
) -> bytes:
    """A film whose frames all differ: the frame number is drawn as eight bright or dark columns."""
    file = io.BytesIO()
    muxing = {"movflags": movflags} if movflags else {}
    with av.open(file, "w", format=format, options=muxing) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, fps)
        container.start_encoding()
        for i in range(num_frames):
            bits = np.array([(i >> bit) & 1 for bit in range(8)], np.uint8)
            row = np.repeat(40 + 170 * bits, WIDTH // 8)
            picture = np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)).copy()
            picture[: HEIGHT // 4, :, 2] = 250  # the top is blue, so that turning shows
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = (i if pts is None else pts[i]), Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def everything(data: bytes) -> tuple[torch.Tensor, list[float]]:
    """Every frame and its time, by the slow and obvious way."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    times = [float((frame.pts - frames[0].pts) * frame.time_base) for frame in frames]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), times


def number(frame: torch.Tensor) -> int:
    """The frame number drawn into a frame."""
    columns = frame[0, HEIGHT // 2].reshape(8, -1).float().mean(1)
    return sum(1 << bit for bit in range(8) if columns[bit] > 125)


def reason(data: bytes, **options: object) -> str:
    with pytest.raises(DataError) as error:
        decode_video(data, "mp4", **(options or {"num_frames": 4}))
    return error.value.reason


VFR = np.cumsum(1 + np.random.default_rng(0).integers(0, 9, 90)).tolist()
FILMS = {
    "gop 30": {"gop": 30},
    "gop 250": {"gop": 250},
    "gop 1": {"gop": 1},
    "gop 5, b-frames": {"gop": 5, "options": {"bf": "3", "b-adapt": "0"}},
    "open gop": {"gop": 15, "options": {"x264-params": "open-gop=1:bframes=3:scenecut=0"}},
    "variable rate": {"pts": VFR},
    "late start": {"pts": list(range(500, 590))},
    "mkv": {"format": "matroska"},
    "webm": {"format": "webm", "codec": "libvpx"},
    "mpegts": {"format": "mpegts", "options": {"bf": "2"}},
    "avi": {"format": "avi", "codec": "mpeg4"},
    "fragmented": {"movflags": "frag_keyframe+empty_moov"},
}


@pytest.fixture(scope="module", params=FILMS)
def clip(request: pytest.FixtureRequest) -> tuple[bytes, torch.Tensor, list[float]]:
    data = film(**FILMS[request.param])
    return data, *everything(data)


@pytest.mark.parametrize("n", [1, 2, 8, 33])
def test_uniform_frames_equal_those_of_decoding_everything(clip: tuple, n: int) -> None:
    data, frames, _ = clip
    expected = np.linspace(0, len(frames) - 1, n).round().astype(int)
    decoded = decode_video(data, "mp4", num_frames=n)
    assert decoded.dtype == torch.uint8
    assert [number(frame) for frame in decoded] == expected.tolist()
    assert torch.equal(decoded, frames[expected])


@pytest.mark.parametrize("fps", [0.7, 4.0, 45.0])
def test_fps_gives_the_frame_shown_at_each_time(clip: tuple, fps: float) -> None:
    data, frames, times = clip
    decoded = decode_video(data, "mp4", fps=fps)
    assert len(decoded) == count_frames(data, fps=fps)
    seconds = video_info(data).seconds
    assert len(decoded) == pytest.approx(seconds * fps, abs=1)
    expected = [
        max(i for i, t in enumerate(times) if t <= k / fps + 1e-4) for k in range(len(decoded))
    ]
    assert torch.equal(decoded, frames[expected])


@pytest.mark.parametrize(("start", "end"), [(0.51, 1.52), (None, 0.7), (1.9, None), (2.0, 2.001)])
def test_span_holds_the_frames_shown_in_it(
    clip: tuple, start: float | None, end: float | None
) -> None:
    data, frames, times = clip
    begin, stop = start or 0.0, end or 1e9
    first = max(i for i, t in enumerate(times) if t <= begin + 1e-4)
    last = max(first, max(i for i, t in enumerate(times) if t < stop - 1e-4))
    expected = np.linspace(first, last, 5).round().astype(int)
    decoded = decode_video(data, "mp4", num_frames=5, start=start, end=end)
    assert torch.equal(decoded, frames[expected])


def test_info_is_that_of_every_frame(clip: tuple) -> None:
    data, frames, times = clip
    info = video_info(data)
    assert (info.num_frames, info.height, info.width) == (len(frames), HEIGHT, WIDTH)
    assert times[-1] < info.seconds < times[-1] + 0.5
    assert info.fps == pytest.approx(len(frames) / info.seconds)


def test_reader_decodes_fewer_frames_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = film(240, gop=10), []
    skip = videos._skip_to

    def counting(reader: object, pts: int) -> object:
        return skip((seen.append(1) or frame for frame in reader), pts)

    monkeypatch.setattr(videos, "_skip_to", counting)
    decode_video(data, "mp4", num_frames=4)
    assert len(seen) < 60


def test_no_keyframe_at_the_start() -> None:
    """Cut a transport stream behind its first keyframe: the frames up to the next are lost."""
    data = film(90, gop=30, format="mpegts", options={"bf": "0", "x264-params": "scenecut=0"})
    with av.open(io.BytesIO(data)) as container:
        places = [(p.pos, p.is_keyframe) for p in container.demux(video=0) if p.size]
    cut = data[places[5][0] :]
    try:
        decoded = decode_video(cut, "ts", num_frames=4)
    except DataError as error:
        assert error.reason == "corrupt_video"  # noqa: PT017
    else:
        assert number(decoded[-1]) == 89


def test_more_frames_than_the_video_has_repeat() -> None:
    decoded = decode_video(film(3), "mp4", num_frames=8)
    assert [number(frame) for frame in decoded] == [0, 0, 1, 1, 1, 1, 2, 2]


def test_max_frames_spreads_them_evenly() -> None:
    data = film(90)
    assert count_frames(data, fps=30, max_frames=10) == 10
    decoded = decode_video(data, "mp4", fps=30, max_frames=10)
    assert torch.equal(decoded, decode_video(data, "mp4", num_frames=10))


def turned(data: bytes, degrees: int) -> bytes:
    """The same film with a display matrix that turns it clockwise."""
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    a, b, c, d = (value << 16 for value in matrix)
    place = data.index(b"tkhd") + 4 + 40
    new = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return data[:place] + new + data[place + 36 :]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_of_the_file_is_applied(degrees: int) -> None:
    data = film(4)
    upright = decode_video(data, "mp4", num_frames=2)
    rotated = decode_video(turned(data, degrees), "mp4", num_frames=2)
    assert torch.equal(rotated, torch.rot90(upright, -degrees // 90, dims=(2, 3)))


def audio_only() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.ones((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def test_bad_files_have_their_own_reasons(tmp_path: Path) -> None:
    data = film()
    assert reason(audio_only()) == "no_video_stream"
    assert reason(b"") == "corrupt_video"
    assert reason(b"not a film at all" * 20) == "corrupt_video"
    assert reason(data[: len(data) // 2]) == "corrupt_video"
    assert reason(film(0, movflags="frag_keyframe+empty_moov")) == "empty_video"
    header_first = tmp_path / "film.mp4"
    with (
        av.open(io.BytesIO(data)) as film_in,
        av.open(str(header_first), "w", options={"movflags": "faststart"}) as film_out,
    ):
        stream = film_out.add_stream_from_template(film_in.streams.video[0])
        for packet in film_in.demux(video=0):
            if packet.size:
                packet.stream = stream
                film_out.mux(packet)
    assert len(decode_video(header_first.read_bytes(), "mp4", num_frames=2)) == 2
    assert reason(header_first.read_bytes()[: len(data) * 3 // 4]) == "corrupt_video"


def test_span_outside_the_film() -> None:
    data = film()
    assert reason(data, num_frames=2, start=3.5) == "empty_video"
    assert reason(data, num_frames=2, start=1.0, end=1.0) == "bad_span"
    assert reason(data, num_frames=2, start=float("nan")) == "bad_span"


def test_limits_are_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = film()
    for name, limit, expected in (
        ("MAX_PIXELS", HEIGHT * WIDTH - 1, "too_many_pixels"),
        ("MAX_DECODED_PIXELS", 4 * HEIGHT * WIDTH - 1, "too_many_pixels"),
        ("MAX_FRAMES", 89, "too_many_frames"),
        ("MAX_SECONDS", 2.9, "too_long_video"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(videos, name, limit)
            patch.setattr(videos, "_read", None)
            assert reason(data) == expected


def test_damage_gives_frames_or_a_data_error() -> None:
    rng = np.random.default_rng(0)
    data = np.frombuffer(film(20, gop=5), np.uint8)
    for _ in range(40):
        broken = data.copy()
        broken[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
        try:
            assert decode_video(broken.tobytes(), "mp4", num_frames=3).shape[:2] == (3, 3)
        except DataError as error:
            assert error.reason.endswith(("video", "video_stream", "pixels", "frames"))  # noqa: PT017


@pytest.mark.parametrize(
    "playlist",
    [b"ffconcat version 1.0\nfile film.mp4\n", b"#EXTM3U\n#EXTINF:1,\nfilm.mp4\n#EXT-X-ENDLIST\n"],
)
def test_playlists_open_no_other_file(
    playlist: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open("film.mp4", "wb") as file:
        file.write(film(5))
    assert reason(playlist) == "corrupt_video"


def test_frames_that_are_shown_many_times_count_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    data = film(3, fps=1)
    assert len(decode_video(data, "mp4", fps=4)) == 12
    monkeypatch.setattr(videos, "MAX_DECODED_PIXELS", 11 * HEIGHT * WIDTH)
    with pytest.raises(DataError, match="12 frames of"):
        decode_video(data, "mp4", fps=4)
    with pytest.raises(DataError, match="frames are asked for"):
        count_frames(data, "mp4", fps=1e9)
