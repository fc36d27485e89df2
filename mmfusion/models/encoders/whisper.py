"""Whisper's encoder (arXiv:2212.04356), run on a clip's own length instead of 30 s.

Sound of n samples at 16 kHz becomes 2 F mel frames of 10 ms and F features of 20 ms: the first 2 F
frames of what Whisper would compute on the clip padded with silence to 30 s. Some silence after the
clip can be encoded with it and dropped: Whisper was trained on padded clips, and the mean cosine to
the features of the whole window rises with it (three spoken words: 0.77 with none, 0.84 with 1 s,
0.91 with 5 s). Legend: N clips, M mel bins, F features, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

from mmfusion.models.encoders.base import Encoder, read_config
from mmfusion.models.loading import checked_path, reading, refuse_missing
from mmfusion.processing.audios import audio_seconds, decode_audio
from mmfusion.processing.base import MediaProcessor
from mmfusion.types import Media, MediaTensors

RATE = 16_000
HOP = 160
WINDOW = 400
SAMPLES_PER_FEATURE = 2 * HOP
FEATURES_PER_SECOND = RATE // SAMPLES_PER_FEATURE
WHISPER_SECONDS = 30


class WhisperEncoder(Encoder):
    """Features of speech and other sound, 50 a second (divided by ``pool``).

    Args:
        path: hub id or folder of a Whisper model, whole or its encoder alone.
        max_seconds: longer clips are cut to this; at most 30.
        pool: average this many neighbouring features into one.
        silence_seconds: of silence encoded after each clip, whose features are dropped.
        dtype: of the weights; ``auto`` keeps the checkpoint's.
        revision: commit, tag or branch of a hub id.
    """

    def __init__(
        self,
        path: str,
        max_seconds: float = 30.0,
        pool: int = 1,
        silence_seconds: float = 1.0,
        dtype: Literal["float32", "bfloat16", "auto"] = "float32",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.path = checked_path(path, "config.json")
        self.revision = revision
        self.dtype = dtype
        if self.config.model_type != "whisper":
            raise ValueError(
                f"{self.path} is a {self.config.model_type} model; expected a whisper one."
            )
        longest = self.config.max_source_positions / FEATURES_PER_SECOND
        if not 0 < max_seconds <= longest:
            raise ValueError(
                f"max_seconds is {max_seconds}; expected more than 0, at most {longest}."
            )
        if pool < 1:
            raise ValueError(f"pool is {pool}; it must be 1 or more.")
        self.max_features = max(1, math.floor(max_seconds * FEATURES_PER_SECOND))
        self.pool = pool
        self.silence = max(0, round(silence_seconds * FEATURES_PER_SECOND))
        self.encoder: Any = None

    @cached_property
    def config(self) -> Any:
        """Whisper's transformers configuration."""
        return read_config(self.path, self.revision)

    @property
    def out_dim(self) -> int:
        return int(self.config.d_model)

    def build(self, pretrained: bool = True) -> None:
        if self.encoder is not None:
            return
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as HFWhisperEncoder

        if pretrained:
            with reading(self.path):
                self.encoder, info = HFWhisperEncoder.from_pretrained(
                    self.path,
                    revision=self.revision,
                    trust_remote_code=False,
                    config=self.config,
                    dtype=self.dtype,
                    key_mapping={r"^(model\.)?encoder\.": ""},
                    output_loading_info=True,
                )
            refuse_missing(info, self.path, "WhisperEncoder")
        else:
            dtype = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
            self.encoder = HFWhisperEncoder(self.config).to(dtype)
        self.train(self.training)

    def media_processor(self) -> MediaProcessor:
        return WhisperProcessor(
            mel_bins=int(self.config.num_mel_bins),
            max_features=self.max_features,
            pool=self.pool,
            silence=self.silence,
            positions=int(self.config.max_source_positions),
        )

    def forward(self, tensors: MediaTensors) -> Tensor:
        mel_NMT, lengths, clips = tensors["mel"], tensors["length"], tensors["clip"]
        net = self.encoder
        hidden = F.gelu(net.conv1(mel_NMT.to(net.conv1.weight.dtype)))
        hidden = F.gelu(net.conv2(hidden)).transpose(1, 2)  # (N, F, D)
        hidden = hidden + net.embed_positions.weight[: hidden.shape[1]]
        hidden = F.dropout(hidden, net.dropout, net.training)
        place = torch.arange(hidden.shape[1], device=hidden.device)
        valid = place < lengths[:, None]
        mask = None
        if not bool(valid.all()):
            mask = torch.zeros(valid.shape, dtype=hidden.dtype, device=hidden.device)
            mask = mask.masked_fill(~valid, torch.finfo(hidden.dtype).min)[:, None, None]
            mask = mask.expand(-1, 1, hidden.shape[1], -1)
        for layer in net.layers:
            hidden = _tensor(layer(hidden, mask))
        longest = int(clips.max())
        return self._pooled(net.layer_norm(hidden[:, :longest]), place[:longest] < clips[:, None])

    def _pooled(self, hidden_NFD: Tensor, valid_NF: Tensor) -> Tensor:
        """Mean over each ``pool`` features, of the valid ones alone."""
        if self.pool == 1:
            return hidden_NFD
        pad = -hidden_NFD.shape[1] % self.pool
        weights = F.pad(valid_NF.to(hidden_NFD.dtype), (0, pad)).unflatten(1, (-1, self.pool))
        groups = F.pad(hidden_NFD, (0, 0, 0, pad)).unflatten(1, (-1, self.pool))
        return torch.einsum("nfpd,nfp->nfd", groups, weights) / weights.sum(2, True).clamp(min=1)


class WhisperProcessor(MediaProcessor):
    """Log-mel frames of a clip, as many as it lasts.

    Args:
        mel_bins: 80, or 128 for the newest models.
        max_features: longest clip, in features of 20 ms.
        pool: features averaged by the encoder.
        silence: features of silence encoded after the clip.
        positions: features the encoder can take.
    """

    modality = "audio"

    def __init__(
        self, mel_bins: int, max_features: int, pool: int, silence: int, positions: int
    ) -> None:
        self.mel_bins = mel_bins
        self.max_features = max_features
        self.pool = pool
        self.silence = silence
        self.positions = positions

    def _span(self, media: Media) -> tuple[float | None, float | None, int]:
        """The start and the end to decode, and the features before pooling."""
        seconds = audio_seconds(media.data, media.format, media.start, media.end)
        end = media.end
        if seconds > self.max_features / FEATURES_PER_SECOND:
            seconds = self.max_features / FEATURES_PER_SECOND
            end = (media.start or 0.0) + seconds
        features = -(-round(seconds * RATE) // SAMPLES_PER_FEATURE)
        return media.start, end, min(max(features, 1), self.max_features)

    def num_features(self, media: Media) -> int:
        return -(-self._span(media)[2] // self.pool)

    def __call__(self, media: Media, rng: np.random.Generator | None = None) -> MediaTensors:
        start, end, features = self._span(media)
        sound = decode_audio(media.data, media.format, RATE, start, end)
        return self._item(sound, features)

    def idle(self) -> MediaTensors:
        return self._item(torch.zeros(SAMPLES_PER_FEATURE), 1)

    def _item(self, sound: Tensor, features: int) -> MediaTensors:
        length = min(features + self.silence, self.positions)
        sound = sound[: features * SAMPLES_PER_FEATURE]
        return {
            "mel": log_mel(sound, length, self.mel_bins),
            "length": torch.tensor(length),
            "clip": torch.tensor(features),
            "num_features": torch.tensor(-(-features // self.pool)),
        }

    def collate(self, items: Sequence[MediaTensors]) -> MediaTensors:
        """Pad to the longest with zeros, which is what the first convolution sees beyond a clip
        that comes alone.
        """
        longest = max(item["mel"].shape[1] for item in items)
        mels = [F.pad(item["mel"], (0, longest - item["mel"].shape[1])) for item in items]
        counts = ("length", "clip", "num_features")
        rest = {name: torch.stack([item[name] for item in items]) for name in counts}
        return {"mel": torch.stack(mels), **rest}


def log_mel(sound: Tensor, features: int, mel_bins: int) -> Tensor:
    """(samples,) at 16 kHz to (M, 2 * features): the first frames of Whisper's log-mel spectrogram
    of the sound padded with silence to 30 s.
    """
    length = features * SAMPLES_PER_FEATURE
    sound = sound[:length]
    total = max(length, min(length + WINDOW, RATE * WHISPER_SECONDS))
    sound = F.pad(sound, (0, total - len(sound)))  # the silence that the last frames see
    spectrum = torch.stft(sound, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True)
    power = spectrum[:, : 2 * features].abs() ** 2
    logs = (_mel_filters(mel_bins) @ power).clamp(min=1e-10).log10()
    return (torch.maximum(logs, logs.max() - 8) + 4) / 4


@lru_cache(maxsize=2)
def _mel_filters(mel_bins: int) -> Tensor:
    """(M, 201) Slaney filters from 0 to 8 kHz."""
    bank = mel_filter_bank(
        1 + WINDOW // 2, mel_bins, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney"
    )
    return torch.from_numpy(bank).float().T


def _tensor(output: Any) -> Tensor:
    """A layer's hidden states, which transformers gave inside a tuple before."""
    return output[0] if isinstance(output, tuple) else output
