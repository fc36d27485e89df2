"""Opens media containers from strangers with FFmpeg (PyAV).

FFmpeg guesses the format from the data, and some formats are playlists that name other files and
addresses. So only formats that hold their media themselves are allowed, and no protocol is.
"""

from __future__ import annotations

import io
from typing import Any

import av

FORMATS = (
    *("mov", "mp4", "m4a", "3gp", "matroska", "webm", "avi", "flv", "asf", "mpegts", "mpeg", "ogg"),
    *("nut", "ivf", "gif", "mpegvideo", "m4v", "h264", "hevc"),
    *("aac", "ac3", "eac3", "aiff", "amr", "au", "caf", "flac", "mp3", "w64", "wav"),
)
"""FFmpeg's names of the formats that may be opened."""


DAMAGE = (av.FFmpegError, EOFError, IndexError)
"""What reading a broken file raises (PyAV: IndexError for a packet of a stream that turned up after
opening).
"""


def open_container(data: bytes) -> Any:
    """Open a media file held in memory; a context manager.

    Raises:
        DAMAGE: for data in no allowed format.
    """
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    return av.open(io.BytesIO(data), options=options, metadata_errors="replace")


def start_seconds(stream: Any) -> float:
    """When the stream starts: some containers do not count from 0. What lies before 0 is a codec's
    run-up, which is not shown.
    """
    return max(float((stream.start_time or 0) * stream.time_base), 0.0)
