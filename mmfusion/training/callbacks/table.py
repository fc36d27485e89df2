"""Answered samples as a W&B table, media included."""

from __future__ import annotations

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
from mmfusion.training.loggers import wandb_of
from mmfusion.types import DataError, Media

THUMBNAIL = (256, 256)
MAX_SECONDS = 30.0
SAMPLE_RATE = 16000


@dataclass(frozen=True)
class Answered:
    """A sample and what the model made of it."""

    source: str
    media: tuple[Media, ...]
    prompt: str
    answer: str
    truth: str


def log_table(
    trainer: L.Trainer, key: str, rows: Sequence[Answered], modalities: Sequence[str]
) -> None:
    """Log rows to the run's W&B, if it has one; a column for the first item of each modality."""
    logger = wandb_of(trainer)
    if logger is None:
        return
    columns = ["step", "source", *modalities, "prompt", "answer", "truth"]
    data = [
        [
            trainer.global_step,
            row.source,
            *(_cell(row.media, modality) for modality in modalities),
            row.prompt,
            row.answer,
            row.truth,
        ]
        for row in rows
    ]
    logger.log_table(key, columns=columns, data=data, step=trainer.global_step)


def _cell(media: Sequence[Media], modality: str) -> Any:
    """The first item of the modality to look at or to hear; None where there is none, or none that
    a viewer would know.
    """
    first = next((item for item in media if item.modality == modality), None)
    if first is None or modality not in _SHOW:
        return None
    try:
        return _SHOW[modality](first)
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


_SHOW: dict[str, Callable[[Media], Any]] = {"image": _image, "video": _video, "audio": _audio}
