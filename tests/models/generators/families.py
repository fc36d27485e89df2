"""What ``test_contract.py`` has to know of each family: how its tiny pipeline is made, and a slow
reference of one item, in words of the diffusers documentation.

A new family is a class here (or beside it) and a line in ``FAMILIES`` of ``test_contract.py``.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mmfusion.models.generators.pixart import PixArt
from mmfusion.models.generators.stable_diffusion import StableDiffusion
from mmfusion.models.generators.stable_diffusion_3 import StableDiffusion3
from mmfusion.models.generators.stable_diffusion_xl import StableDiffusionXL
from mmfusion.models.generators.text_to_video_sd import TextToVideoSD
from mmfusion.models.generators.wan import Wan
from mmfusion.processing.videos import decode_video
from mmfusion.types import Conditioning, Media
from tests.models.generators import tiny

STEPS = 100
"""Of every tiny scheduler's training."""


class Family(ABC):
    """One family on its tiny pipeline. ``g`` is its generator, built; items come one at a time.

    Attributes:
        made_shape: of a medium that it makes, as :meth:`decoded` gives it.
        passes: of the denoiser in a step with guidance.
        misfits: for each, a folder of the pipeline, what to change in its configuration, and what
            the error says.
        prediction: of DDPM; None: flow matching.
    """

    save: Callable[[Path], str]
    made_shape: tuple[int, ...]
    passes: int = 1
    misfits: Sequence[tuple[str, dict[str, Any], str]] = ()
    prediction: str | None = "epsilon"
    shift: float = 1.0

    @abstractmethod
    def make(self, path: str, **options: Any) -> Any:
        """The generator, not built."""

    @abstractmethod
    def media(self, seed: int) -> Media:
        """A target."""

    @abstractmethod
    def decoded(self, media: Media) -> Tensor:
        """A medium that was made, as numbers."""

    @abstractmethod
    def encoded(self, path: str, captions: list[str]) -> tuple[Conditioning, Conditioning]:
        """What the pipeline makes of captions, and of "" for guidance."""

    @abstractmethod
    def latents(self, g: Any, tensors: dict[str, Tensor], draw: torch.Generator) -> Tensor:
        """(1, ...) of one target."""

    @abstractmethod
    def predicted(self, g: Any, noisy: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        """By a plain call of the denoiser."""

    def loss(self, g: Any, x: Tensor, given: Conditioning, draw: torch.Generator) -> Tensor:
        """() as the documentation says it."""
        return self.flow(g, x, given, draw) if self.prediction is None else self.ddpm(
            g, x, given, draw
        )  # fmt: skip

    def ddpm(self, g: Any, x: Tensor, given: Conditioning, draw: torch.Generator) -> Tensor:
        """examples/text_to_image/train_text_to_image.py, in words of one item."""
        scheduler = diffusers.DDPMScheduler.from_pretrained(g.path, subfolder="scheduler")
        step = torch.randint(0, STEPS, (1,), generator=draw)
        noise = torch.randn(x.shape[1:], generator=draw)[None]
        alpha = scheduler.alphas_cumprod[step].view(-1, *[1] * (x.ndim - 1))
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * x
        wanted = {"epsilon": noise, "v_prediction": velocity, "sample": x}[str(self.prediction)]
        return F.mse_loss(self.predicted(g, noisy, step, given), wanted)

    def flow(self, g: Any, x: Tensor, given: Conditioning, draw: torch.Generator) -> Tensor:
        """examples/dreambooth/train_dreambooth_sd3.py, in words of one item."""
        place = int(torch.randn(1, generator=draw).sigmoid() * STEPS)
        noise = torch.randn(x.shape[1:], generator=draw)[None]
        sigma = (STEPS - place) / STEPS
        sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        noisy = (1 - sigma) * x + sigma * noise
        found = self.predicted(g, noisy, torch.tensor([sigma * STEPS]), given)
        return F.mse_loss(found, noise - x)


class Pictures(Family):
    """Squares of 16 pixels."""

    made_shape = (16, 16, 3)

    def media(self, seed: int) -> Media:
        return picture(seed)

    def decoded(self, media: Media) -> Tensor:
        return torch.from_numpy(np.array(Image.open(io.BytesIO(media.data)))).float()

    def latents(self, g: Any, tensors: dict[str, Tensor], draw: torch.Generator) -> Tensor:
        return latents_of(g.vae, tensors["pixels"], draw)


class StableDiffusionFamily(Pictures):
    misfits = (
        (
            "unet",
            {"cross_attention_dim": 48},
            "conditioning of width 48, its text encoder gives 32",
        ),
        ("vae", {"latent_channels": 8}, "latents of width 4, its VAE gives 8"),
    )

    def __init__(self, prediction: str = "epsilon") -> None:
        self.prediction = prediction

    def save(self, folder: Path) -> str:
        return tiny.save_stable_diffusion(folder, self.prediction or "")

    def make(self, path: str, **options: Any) -> Any:
        return StableDiffusion(path, **options)

    def encoded(self, path: str, captions: list[str]) -> tuple[Conditioning, Conditioning]:
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            path, safety_checker=None, feature_extractor=None, image_encoder=None
        )
        ours, none = pipeline.encode_prompt(captions, "cpu", 1, True)
        return Conditioning(ours), Conditioning(none)

    def predicted(self, g: Any, noisy: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        return g.denoiser(noisy, time, encoder_hidden_states=given.tokens).sample


class StableDiffusionXLFamily(Pictures):
    save = staticmethod(tiny.save_stable_diffusion_xl)
    misfits = (
        (
            "unet",
            {"cross_attention_dim": 48},
            "conditioning of width 48, its text encoder gives 56",
        ),
        ("text_encoder_2", {"projection_dim": 16}, "pooled of width 20, its text encoder gives 16"),
        ("vae", {"latent_channels": 8}, "latents of width 4, its VAE gives 8"),
    )

    def make(self, path: str, **options: Any) -> Any:
        return StableDiffusionXL(path, **options)

    def encoded(self, path: str, captions: list[str]) -> tuple[Conditioning, Conditioning]:
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(path, add_watermarker=False)
        tokens, none, pooled, none_pooled = pipeline.encode_prompt(captions)
        return Conditioning(tokens, pooled), Conditioning(none, none_pooled)

    def predicted(self, g: Any, noisy: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        added = {
            "text_embeds": given.pooled,
            "time_ids": torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]),
        }
        return g.denoiser(noisy, time, given.tokens, added_cond_kwargs=added).sample


class StableDiffusion3Family(Pictures):
    prediction = None
    shift = 3.0
    misfits = (
        ("text_encoder_3", {"d_model": 48}, "conditioning of width 32, its text encoder gives 48"),
        ("text_encoder_2", {"projection_dim": 9}, "pooled of width 24, its text encoder gives 19"),
        ("vae", {"latent_channels": 8}, "latents of width 4, its VAE gives 8"),
    )

    def __init__(self, t5: bool = True) -> None:
        self.t5 = t5

    def save(self, folder: Path) -> str:
        return tiny.save_stable_diffusion_3(folder, self.t5)

    def make(self, path: str, **options: Any) -> Any:
        return StableDiffusion3(path, t5_tokens=6, **options)

    def encoded(self, path: str, captions: list[str]) -> tuple[Conditioning, Conditioning]:
        absent = {} if self.t5 else {"text_encoder_3": None, "tokenizer_3": None}
        pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(path, **absent)
        tokens, none, pooled, none_pooled = pipeline.encode_prompt(
            captions, None, None, max_sequence_length=6
        )
        return Conditioning(tokens, pooled), Conditioning(none, none_pooled)

    def predicted(self, g: Any, noisy: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        return g.denoiser(noisy, given.tokens, given.pooled, time).sample


class PixArtFamily(Pictures):
    misfits = (
        ("transformer", {"caption_channels": 48}, "of width 48, its text encoder gives 32"),
        ("vae", {"latent_channels": 8}, "latents of width 4, its VAE gives 8"),
    )

    def __init__(self, kind: Any = diffusers.PixArtAlphaPipeline, **transformer: Any) -> None:
        self.kind, self.transformer = kind, transformer

    def save(self, folder: Path) -> str:
        return tiny.save_pixart(folder, self.kind, **self.transformer)

    def make(self, path: str, **options: Any) -> Any:
        return PixArt(path, size=16, **options)

    def encoded(self, path: str, captions: list[str]) -> tuple[Conditioning, Conditioning]:
        tokens, mask, none, none_mask = self.kind.from_pretrained(path).encode_prompt(captions)
        return Conditioning(tokens, mask=mask.bool()), Conditioning(none, mask=none_mask.bool())

    def predicted(self, g: Any, noisy: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        added = {"resolution": None, "aspect_ratio": None}
        if self.transformer:
            added = {"resolution": torch.full((1, 2), 16.0), "aspect_ratio": torch.ones(1, 1)}
        # What is masked is as good as not there.
        tokens = given.tokens if given.mask is None else given.tokens[:, given.mask[0]]
        found = g.denoiser(noisy, tokens, time, added).sample
        return found.chunk(2, dim=1)[0]


class Clips(Family):
    """16 pixels a side."""

    def media(self, seed: int) -> Media:
        return clip(seed)

    def decoded(self, media: Media) -> Tensor:
        num_frames = self.made_shape[0]
        return decode_video(media.data, "mp4", num_frames=num_frames).permute(0, 2, 3, 1).float()


class TextToVideoSDFamily(Clips):
    save = staticmethod(tiny.save_text_to_video_sd)
    made_shape = (3, 16, 16, 3)
    misfits = StableDiffusionFamily.misfits

    def make(self, path: str, **options: Any) -> Any:
        return TextToVideoSD(path, num_frames=3, **options)

    def encoded(self, path: str, captions: list[str]) -> tuple[Conditioning, Conditioning]:
        pipeline = diffusers.TextToVideoSDPipeline.from_pretrained(path)
        ours, none = pipeline.encode_prompt(captions, "cpu", 1, True)
        return Conditioning(ours), Conditioning(none)

    def latents(self, g: Any, tensors: dict[str, Tensor], draw: torch.Generator) -> Tensor:
        frames = [g.vae.encode(x[None] / 127.5 - 1).latent_dist for x in tensors["pixels"][0]]
        mean = torch.stack([frame.mean for frame in frames], 2)
        std = torch.stack([frame.std for frame in frames], 2)
        return 0.25 * (mean + std * torch.randn(mean.shape[1:], generator=draw))

    def predicted(self, g: Any, noisy: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        return g.denoiser(noisy, time, given.tokens).sample


class WanFamily(Clips):
    save = staticmethod(tiny.save_wan)
    made_shape = (5, 16, 16, 3)
    prediction = None
    shift = 3.0
    passes = 2  # WanPipeline guides by a second pass, whatever the batch
    misfits = (
        ("transformer", {"text_dim": 48}, "conditioning of width 48, its text encoder gives 32"),
        ("vae", {"z_dim": 8}, "latents of width 4, its VAE gives 8"),
    )

    def make(self, path: str, **options: Any) -> Any:
        return Wan(path, height=16, width=16, num_frames=5, tokens=7, **options)

    def encoded(self, path: str, captions: list[str]) -> tuple[Conditioning, Conditioning]:
        pipeline = diffusers.WanPipeline.from_pretrained(path)
        ours, none = pipeline.encode_prompt(captions, max_sequence_length=7)
        return Conditioning(ours), Conditioning(none)

    def latents(self, g: Any, tensors: dict[str, Tensor], draw: torch.Generator) -> Tensor:
        video = tensors["pixels"].float().transpose(1, 2) / 127.5 - 1
        posterior = g.vae.encode(video).latent_dist
        noise = torch.randn(posterior.mean.shape[1:], generator=draw)
        drawn = posterior.mean + posterior.std * noise
        statistics = zip((0.1, -0.2, 0.3, 0.0), (0.5, 1.5, 1.0, 2.0), strict=True)
        channels = [(drawn[:, c] - mean) / std for c, (mean, std) in enumerate(statistics)]
        return torch.stack(channels, 1)

    def predicted(self, g: Any, noisy: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        return g.denoiser(noisy, time, given.tokens).sample


def latents_of(vae: Any, pixels: Tensor, draw: torch.Generator) -> Tensor:
    """Of one picture: a draw from the posterior, shifted and scaled."""
    posterior = vae.encode(pixels.float() / 127.5 - 1).latent_dist
    noise = torch.randn(posterior.mean.shape[1:], generator=draw)
    return 0.25 * (posterior.mean + posterior.std * noise - (vae.config.shift_factor or 0))


def picture(seed: int = 0) -> Media:
    values = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "png")
    return Media("image", file.getvalue(), "png")


def clip(seed: int = 0, frames: int = 8, fps: int = 8, size: tuple[int, int] = (32, 48)) -> Media:
    """Frames of one grey each, ever brighter. x264 codes sides of 16 alike each time."""
    draw = np.random.default_rng(seed)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            grey = 20 + 25 * index + draw.integers(0, 5, (*size, 3))
            shown = av.VideoFrame.from_ndarray(grey.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(shown))
        container.mux(stream.encode(None))
    return Media("video", file.getvalue(), "mp4")
