"""How a diffusion model is trained: what is mixed with noise, and what it has to predict.

Read from the ``scheduler_config.json`` that comes with the weights. M items, x a latent, n noise.
Sources: DDPM (arXiv:2006.11239), v-prediction (arXiv:2202.00512), min-SNR (arXiv:2303.09556),
rectified flow with logit-normal times (arXiv:2403.03206).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")
DDPM_KINDS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",
)
"""Samplers of models that were all trained by DDPM's forward process."""
FLOW_KINDS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


def generators_of(keys: Sequence[int], seed: int) -> list[torch.Generator]:
    """One generator an item, on the CPU: draws do not depend on the device or on the batch."""
    return [torch.Generator().manual_seed((key ^ seed) & (1 << 63) - 1) for key in keys]


class NoiseSchedule(ABC):
    """The forward process of a model."""

    @abstractmethod
    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """(M,) noise levels, one from each generator."""

    @abstractmethod
    def noised(self, x: Tensor, n: Tensor, levels_M: Tensor) -> Tensor:
        """The latents mixed with noise."""

    @abstractmethod
    def target(self, x: Tensor, n: Tensor, levels_M: Tensor) -> Tensor:
        """What the model has to predict."""

    @abstractmethod
    def timesteps(self, levels_M: Tensor) -> Tensor:
        """(M,) as the model takes them."""

    def weights(self, levels_M: Tensor, min_snr: float) -> Tensor:
        """(M,) weights of the squared error; 1 without ``min_snr`` (0).

        Raises:
            ValueError: where the process has no such weights.
        """
        if min_snr:
            raise ValueError(
                f"min_snr is {min_snr}, but {type(self).__name__} has no signal-to-noise weights; "
                "leave it at 0."
            )
        return torch.ones(len(levels_M), device=levels_M.device)


class DDPMNoise(NoiseSchedule):
    """A variance-preserving chain of discrete steps.

    Args:
        config: the ``scheduler_config.json``, of the training scheduler or of a sampler.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from diffusers import DDPMScheduler

        self.scheduler = DDPMScheduler.from_config(dict(config))
        self.prediction = str(self.scheduler.config.prediction_type)
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"prediction_type is {self.prediction!r}; expected one of {PREDICTIONS}."
            )

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        steps = int(self.scheduler.config.num_train_timesteps)
        return torch.cat([torch.randint(0, steps, (1,), generator=g) for g in generators])

    def noised(self, x: Tensor, n: Tensor, levels_M: Tensor) -> Tensor:
        return self.scheduler.add_noise(x, n, levels_M)

    def target(self, x: Tensor, n: Tensor, levels_M: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return n
        if self.prediction == "sample":
            return x
        return self.scheduler.get_velocity(x, n, levels_M)

    def timesteps(self, levels_M: Tensor) -> Tensor:
        return levels_M

    def weights(self, levels_M: Tensor, min_snr: float) -> Tensor:
        if not min_snr:
            return super().weights(levels_M, 0.0)
        from diffusers.training_utils import compute_snr

        snr = compute_snr(self.scheduler, levels_M)
        clipped = snr.clamp(max=min_snr)
        if self.prediction == "epsilon":
            return clipped / snr
        return clipped / (snr + 1) if self.prediction == "v_prediction" else clipped


class FlowNoise(NoiseSchedule):
    """Straight lines from data to noise; times are logit-normal.

    Args:
        config: the ``scheduler_config.json``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.steps = int(config.get("num_train_timesteps", 1000))

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        return torch.cat([torch.randn(1, generator=g) for g in generators]).sigmoid()

    def noised(self, x: Tensor, n: Tensor, levels_M: Tensor) -> Tensor:
        u = levels_M.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return (1 - u) * x + u * n

    def target(self, x: Tensor, n: Tensor, levels_M: Tensor) -> Tensor:
        return n - x

    def timesteps(self, levels_M: Tensor) -> Tensor:
        return levels_M * self.steps


def noise_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The process that a model's scheduler tells of.

    Raises:
        ValueError: for a scheduler whose training is not known.
    """
    name = str(config.get("_class_name", ""))
    if name in DDPM_KINDS and not config.get("use_flow_sigmas"):
        return DDPMNoise(config)
    if name in FLOW_KINDS or config.get("use_flow_sigmas"):
        return FlowNoise(config)
    raise ValueError(
        f"the scheduler is {name or 'not named'}; how such a model is trained is known for "
        f"{[*DDPM_KINDS, *FLOW_KINDS]}."
    )
