"""The modality generator: makes media from conditioning, and tells how good a conditioning is.

M targets, C tokens of the conditioning and D_g their width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from mmfusion.models.generators.noise import NoiseSchedule, generators_of
from mmfusion.models.generators.stored import moments_in, text_in
from mmfusion.processing.base import MediaProcessor
from mmfusion.types import (
    Captions,
    Conditioning,
    ConditioningSpec,
    Media,
    MediaTensors,
    TargetBatch,
)

TEXT_ENCODER, VAE, DENOISER, VOCODER = "text_encoder", "vae", "denoiser", "vocoder"
PARTS = frozenset({TEXT_ENCODER, VAE, DENOISER, VOCODER})
"""Of a generator. A vocoder, which turns what the VAE decodes into sound, is of use in sampling
alone: no objective needs it.
"""
ONLY_DRAWN = frozenset({"guidance_rescale"})
"""Arguments of generators' constructors that matter when media are made and else not: no loss and
no stored feature depends on them.
"""
CAPTIONS_TOGETHER = 32
"""That are encoded in one pass: those of a whole optimizer step may be many."""


def check_seed(name: str, seed: Any) -> None:
    """Before anything is drawn.

    Args:
        name: of the option.
        seed: given for it.

    Raises:
        ValueError: for what torch's generators do not take.
    """
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    if not whole or not -(2**63) <= int(seed) < 2**63:
        raise ValueError(
            f"{name} is {seed!r}; expected a whole number of 64 bits, from -2**63 to 2**63 - 1."
        )


@dataclass(frozen=True)
class Sampling:
    """How media are drawn.

    Attributes:
        steps: of the sampler.
        guidance_scale: of classifier-free guidance; 1 is none.
        seed: of the noise; item m draws from seed + m. Or a seed for each item.

    Raises:
        ValueError: for no steps, a scale that is negative or not finite, seeds of more than 64
            bits, or what is no number.
    """

    steps: int = 50
    guidance_scale: float = 7.5
    seed: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"sampling.steps is {self.steps!r}; expected 1 or more.")
        scale = self.guidance_scale
        if not isinstance(scale, Real) or not 0 <= scale < math.inf:
            raise ValueError(
                f"sampling.guidance_scale is {scale!r}; expected a finite number, 0 or more (1: no "
                "guidance)."
            )
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        for seed in seeds:
            check_seed("sampling.seed", seed)
        whole = tuple(int(seed) for seed in seeds)  # numpy's among them
        object.__setattr__(self, "seed", whole if seeds is self.seed else whole[0])

    def noise(self, count: int) -> list[torch.Generator]:
        """What each of ``count`` items draws from, on the CPU: the same on any device."""
        seeds = self.seed
        if isinstance(seeds, int):
            seeds = tuple(seeds + item for item in range(count))
        if len(seeds) != count:
            raise ValueError(f"sampling.seed names {len(seeds)} seeds; expected {count}.")
        return [torch.Generator().manual_seed(seed) for seed in seeds]


class Generator(nn.Module, ABC):
    """One pretrained generator. The constructor reads configuration only; ``build`` makes the parts
    that are needed and loads their weights. It owns its conditioning, noise schedule, prediction
    type, scaling of latents and sampling.
    """

    modality: str
    dtype: torch.dtype = torch.float32
    """Of the weights of parts that :meth:`build` makes."""
    stored_empty: Conditioning | None = None
    """The text encoding of "", where it was stored."""

    @property
    @abstractmethod
    def spec(self) -> ConditioningSpec:
        """The conditioning it takes. Known before ``build``."""

    @abstractmethod
    def target_processor(self) -> MediaProcessor:
        """From a media file to what :meth:`encode_media` takes. Works before ``build``."""

    @abstractmethod
    def build(self, parts: Collection[str], pretrained: bool = True) -> None:
        """Make some of :data:`PARTS`; those that are there stay. With ``pretrained`` load every
        weight, failing if one is missing, else initialise at random.
        """

    @abstractmethod
    def noise_schedule(self) -> NoiseSchedule:
        """The forward process it was trained by. Works before ``build``."""

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """Its own text encoding of M captions. Needs the text encoder."""

    @abstractmethod
    def moments(self, tensors: MediaTensors) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (M, ...) of the VAE's latents of M targets, without
        gradients. Needs the VAE.
        """

    @abstractmethod
    def scaled(self, latents: Tensor) -> Tensor:
        """Latents of the VAE (M, ...) as the denoiser takes them. Works before ``build``."""

    @abstractmethod
    def denoise(self, noisy: Tensor, timesteps_M: Tensor, conditioning: Conditioning) -> Tensor:
        """Its prediction for noisy latents. Needs the denoiser."""

    @abstractmethod
    def sample(
        self, conditioning: Conditioning, empty: Conditioning, sampling: Sampling
    ) -> list[Media]:
        """M media, drawn together: one pass of the denoiser a step. Needs VAE and denoiser, and
        the vocoder where there is one.

        Args:
            conditioning: of M items.
            empty: of one item, what the text encoder makes of "": guidance leads away from it.
            sampling: steps, scale and seed.
        """

    def check(self, sampling: Sampling) -> None:
        """Works before ``build``.

        Raises:
            ValueError: for what its sampler cannot do.
        """

    def modules_by_name(self) -> Mapping[str, str]:
        """Which of :data:`PARTS` each of its modules belongs to, by the attribute that holds it
        once it is built; what a tuning policy may name. Works before ``build``.
        """
        return {part: part for part in sorted(PARTS)}

    def train(self, mode: bool = True) -> Any:
        """What is frozen stays in evaluation mode, also beside a denoiser that trains: dropout in
        the text encoder would move the targets of alignment.
        """
        super().train(mode and any(p.requires_grad for p in self.parameters()))
        for part in self.children():
            part.train(self.training and any(p.requires_grad for p in part.parameters()))
        return self

    def encode_media(self, tensors: MediaTensors, generators: Sequence[torch.Generator]) -> Tensor:
        """Scaled latents (M, ...) of M targets, each drawn by its own generator, without gradients.
        Needs the VAE, unless its moments come with the targets.
        """
        mean, std = moments_in(tensors) or self.moments(tensors)
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
        return self.scaled(mean + std * noise.to(mean))

    @torch.no_grad()
    def encode_captions(self, target: TargetBatch | Captions) -> Conditioning:
        """Text encoding of M captions, without gradients, in passes of bounded memory. Needs the
        text encoder, unless their encodings come with the targets.
        """
        if stored := text_in(target.tensors):
            return stored
        starts = range(0, len(target.captions), CAPTIONS_TOGETHER)
        return Conditioning.cat(
            [self.encode_text(target.captions[i : i + CAPTIONS_TOGETHER]) for i in starts]
        )

    @torch.no_grad()
    def encode_empty(self) -> Conditioning:
        """Text encoding of "", of one item. Needs the text encoder, unless it was stored."""
        if self.stored_empty is None:
            return self.encode_text([""])
        # It was read from a file; the other parts may have been moved since.
        built = next(self.parameters(), self.stored_empty.tokens)
        return self.stored_empty.to(built.device)

    def paired(
        self, conditioning: Conditioning, empty: Conditioning
    ) -> tuple[Conditioning, Conditioning]:
        """Our conditioning and, for each of its items, that of "", with as many tokens: guidance
        runs both in one pass, and either may stand for the other in training.

        Where the numbers differ each is repeated to their least common multiple. Cross-attention
        has no order, and a softmax over k copies of a set is the one over the set; so this changes
        nothing. A generator that attends in another way says so here.
        """
        count, ours = conditioning.tokens.shape[:2]
        tokens = math.lcm(ours, empty.tokens.shape[1])

        def repeated(given: Conditioning) -> Conditioning:
            times = tokens // given.tokens.shape[1]
            pooled, mask = given.pooled, given.mask
            return Conditioning(
                given.tokens.repeat(1, times, 1).expand(count, -1, -1),
                None if pooled is None else pooled.expand(count, -1),
                None if mask is None else mask.repeat(1, times).expand(count, -1),
            )

        return repeated(conditioning), repeated(empty)

    def check_paired(self, given: ConditioningSpec) -> None:
        """Call before anything is loaded where :meth:`paired` will be needed.

        Args:
            given: what the output projector gives.

        Raises:
            ValueError: where that and the encoding of "" cannot be paired.
        """
        self.paired(given.blank(), self.spec.blank())

    def check_drawn(self, given: ConditioningSpec) -> None:
        """Call before anything is loaded where :meth:`sample` will be needed.

        Args:
            given: what the output projector gives.

        Raises:
            ValueError: where media cannot be made of that, led away from the encoding of "".
        """
        self.check_paired(given)

    def denoising_loss(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        keys: Sequence[int],
        seed: int = 0,
        min_snr: float = 0.0,
    ) -> Tensor:
        """(M,) mean squared errors of the prediction, as the generator was trained, under a
        conditioning. Noise and its level follow from each target's key alone.

        Args:
            latents: (M, ...).
            conditioning: of M items.
            keys: M numbers.
            seed: of the recipe.
            min_snr: gamma of min-SNR weights; 0 weighs every level alike.
        """
        schedule, latents = self.noise_schedule(), latents.float()  # in half of it noise may be 0
        generators = generators_of(keys, seed)
        levels = schedule.draw(generators)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
        levels, noise = levels.to(latents.device), noise.to(latents)
        noisy = schedule.noised(latents, noise, levels)
        found = self.denoise(noisy, schedule.timesteps(levels), conditioning)
        wanted = schedule.target(latents, noise, levels)
        errors = (found.float() - wanted.float()).square().flatten(1).mean(1)
        return errors * schedule.weights(levels, min_snr)
