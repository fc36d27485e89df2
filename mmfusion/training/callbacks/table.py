"""Answered samples as a W&B table, media included."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import av
import lightning as L
from PIL import Image

from mmfusion.processing.audios import audio_seconds, decode_audio
from mmfusion.processing.containers import open_container
from mmfusion.processing.images import decode_image
from mmfusion.training.wandb_run import wandb_of
from mmfusion.types import DataError, Media

THUMBNAIL = (256, 256)
MAX_SECONDS = 30.0
SAMPLE_RATE = 16000
PLAYED = ("mp4", "webm", "gif")
MAX_CLIP = 4 * 2**20
"""Bytes of a video of an answer."""


@dataclass(frozen=True)
class Answered:
    """A sample and what the model made of it.

    Attributes:
        source: its name.
        media: that are asked about.
        prompt, answer, truth: in words.
        made: media of the answer, where they were made.
        wanted: media of the true answer.
        undrawn: modalities of media that the answer has and that were not made.
        spoken, truth_spoken: whether words of the answer, and of the true one, are said aloud.
    """

    source: str
    media: tuple[Media, ...]
    prompt: str
    answer: str
    truth: str
    made: tuple[Media, ...] = ()
    wanted: tuple[Media, ...] = ()
    spoken: bool = False
    truth_spoken: bool = False
    undrawn: tuple[str, ...] = ()


def log_table(
    trainer: L.Trainer,
    key: str,
    rows: Sequence[Answered],
    takes: Sequence[str],
    makes: Sequence[str] = (),
) -> None:
    """Log rows to the run's W&B, if it has one; a column for the first item of each modality that
    the model takes, and two of each that it makes: its own and the true one.
    """
    logger = wandb_of(trainer)
    if logger is None:
        return
    answers = [[f"{side} {modality}" for modality in makes] for side in ("answer", "truth")]
    columns = ["step", "source", *takes, "prompt", "answer", *answers[0], "truth", *answers[1]]
    data = [
        [
            trainer.global_step,
            row.source,
            *(_cell(row.media, modality, _GIVEN) for modality in takes),
            row.prompt,
            row.answer,
            *(_cell(row.made, modality, _ANSWERS) for modality in makes),
            row.truth,
            *(_cell(row.wanted, modality, _ANSWERS) for modality in makes),
        ]
        for row in rows
    ]
    logger.log_table(key, columns=columns, data=data, step=trainer.global_step)


def _cell(media: Sequence[Media], modality: str, show: Show) -> Any:
    """The first item of the modality to look at or to hear; None where there is none, or none that
    a viewer would know. Media that features took the place of are not there.
    """
    first = next((item for item in media if item.modality == modality and item.data), None)
    if first is None or modality not in show:
        return None
    try:
        return show[modality](first)
    except (DataError, av.FFmpegError):
        return None


def _image(media: Media) -> Any:
    import wandb

    pixels = decode_image(media.data, media.format).permute(1, 2, 0).numpy()
    return wandb.Image(_small(Image.fromarray(pixels)))


def _video(media: Media) -> Any:
    """The middle frame of the span's first seconds."""
    import wandb

    start = media.start or 0.0
    end = min(start + MAX_SECONDS, media.end if media.end is not None else math.inf)
    with open_container(media.data) as container:
        frames = [
            _small(frame.to_image())
            for frame in itertools.takewhile(lambda f: f.time <= end, container.decode(video=0))
            if frame.time >= start
        ]
    return wandb.Image(frames[len(frames) // 2]) if frames else None


def _clip(media: Media) -> Any:
    """To be played; None where it is long, or only a part of the file."""
    import wandb

    whole = media.start is None and media.end is None
    if whole and media.format in PLAYED and len(media.data) <= MAX_CLIP:
        return wandb.Video(io.BytesIO(media.data), format=media.format)
    return None


def _audio(media: Media) -> Any:
    import wandb

    seconds = audio_seconds(media.data, media.format, media.start, media.end)
    start = media.start or 0.0
    end = start + min(seconds, MAX_SECONDS)
    samples = decode_audio(media.data, media.format, SAMPLE_RATE, start, end)
    return wandb.Audio(samples.numpy(), sample_rate=SAMPLE_RATE)


def _small(picture: Image.Image) -> Image.Image:
    picture.thumbnail(THUMBNAIL)
    return picture


Show = dict[str, Callable[[Media], Any]]
_GIVEN: Show = {"image": _image, "video": _video, "audio": _audio}
_ANSWERS: Show = {**_GIVEN, "video": _clip}  # a column of a table holds one kind of cell
