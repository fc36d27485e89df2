"""How a diffusion model is trained: what is mixed with noise, and what it has to predict.

Read from the ``scheduler_config.json`` that comes with the weights. M items, x a latent, n noise.
Sources: DDPM (arXiv:2006.11239), v-prediction (arXiv:2202.00512), min-SNR (arXiv:2303.09556),
rectified flow with logit-normal times (arXiv:2403.03206).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

COSINE_KINDS = ("CosineDPMSolverMultistepScheduler",)


def generators_of(keys: Sequence[int], seed: int) -> list[torch.Generator]:
    """One generator an item, on the CPU: draws do not depend on the device or on the batch."""
    # Of a seed torch keeps the low 32 bits: those of a product in which all 64 bits count.
    mixed = ((key ^ seed) * 0x9E3779B97F4A7C15 % (1 << 64) >> 32 for key in keys)
    return [torch.Generator().manual_seed(number) for number in mixed]


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
                "leave min_snr at 0, as such models are trained."
            )
        return torch.ones(len(levels_M), device=levels_M.device)


class DDPMNoise(NoiseSchedule):
    """A variance-preserving chain of discrete steps.

    Args:
        config: the ``scheduler_config.json``, of the training scheduler or of a sampler.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from diffusers import DDPMScheduler

        with _as_configured(config):
            self.scheduler = DDPMScheduler.from_config(dict(config))
            _check_table(self.scheduler.alphas_cumprod, config)
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
        if self.prediction == "epsilon":
            return (min_snr / snr).clamp(max=1)  # also where nothing is left of the signal
        clipped = snr.clamp(max=min_snr)
        return clipped / (snr + 1) if self.prediction == "v_prediction" else clipped


class FlowNoise(NoiseSchedule):
    """Straight lines from data to noise, in steps whose times are logit-normal and then shifted
    towards noise, as diffusers' ``examples/dreambooth/train_dreambooth_sd3.py`` draws them. A level
    is a step's place in the scheduler's table, 0 the noisiest.

    Args:
        config: the ``scheduler_config.json``, of the training scheduler or of a sampler.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        prediction = config.get("prediction_type", "flow_prediction")
        if prediction != "flow_prediction":
            raise ValueError(
                f"prediction_type is {prediction!r} in a scheduler of flow matching; expected "
                "'flow_prediction'."
            )
        with _as_configured(config):
            shift = config.get("flow_shift" if config.get("use_flow_sigmas") else "shift", 1)
            scheduler: Any = FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=config.get("num_train_timesteps", 1000),
                shift=float(shift),
                # Where the shift depends on the size, a sampler's matter, training has none.
                use_dynamic_shifting=bool(config.get("use_dynamic_shifting")),
            )
            _check_table(scheduler.sigmas, config)
        self.sigmas, self.steps = scheduler.sigmas, scheduler.timesteps

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        times = torch.cat([torch.randn(1, generator=g) for g in generators]).sigmoid()
        return (times * len(self.sigmas)).long()

    def noised(self, x: Tensor, n: Tensor, levels_M: Tensor) -> Tensor:
        sigmas = self.sigmas.to(x)[levels_M].view(-1, *[1] * (x.ndim - 1))
        return (1 - sigmas) * x + sigmas * n

    def target(self, x: Tensor, n: Tensor, levels_M: Tensor) -> Tensor:
        return n - x

    def timesteps(self, levels_M: Tensor) -> Tensor:
        return self.steps.to(levels_M.device)[levels_M]


class CosineNoise(NoiseSchedule):
    """A quarter of a circle from data to noise, x cos(a) + n sin(a) with a = pi t / 2 and t uniform
    in [0, 1], which is the model's timestep; it predicts the velocity n cos(a) - x sin(a). As
    Stable Audio is trained (https://github.com/Stability-AI/stable-audio-tools, ``training/
    diffusion.py``, objective ``v``).

    Args:
        config: the ``scheduler_config.json`` of a CosineDPMSolverMultistepScheduler.

    Raises:
        ValueError: for another prediction, or data of another spread.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        prediction, spread = config.get("prediction_type", "v_prediction"), config.get("sigma_data")
        if prediction != "v_prediction":
            raise ValueError(f"prediction_type is {prediction!r}; expected 'v_prediction'.")
        if spread not in (None, 1, 1.0):
            raise ValueError(f"sigma_data is {spread}; expected 1.")
        most, least = config.get("sigma_max", 500), config.get("sigma_min", 0.3)
        with _as_configured(config):
            self.sigmas = (float(most), float(least))
            if not 0 < self.sigmas[1] < self.sigmas[0] < math.inf:
                raise ValueError(f"sigma_max is {most} and sigma_min {least}")

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        return torch.cat([torch.rand(1, generator=g) for g in generators])

    def noised(self, x: Tensor, n: Tensor, levels_M: Tensor) -> Tensor:
        cos, sin = _circle(levels_M, x)
        return cos * x + sin * n

    def target(self, x: Tensor, n: Tensor, levels_M: Tensor) -> Tensor:
        cos, sin = _circle(levels_M, x)
        return cos * n - sin * x

    def timesteps(self, levels_M: Tensor) -> Tensor:
        return levels_M

    def weights(self, levels_M: Tensor, min_snr: float) -> Tensor:
        if not min_snr:
            return super().weights(levels_M, 0.0)
        snr = (levels_M * torch.pi / 2).tan().square().reciprocal()
        return torch.minimum(min_snr / (snr + 1), 1 / (1 + 1 / snr))

    def sampled(self, steps: int) -> list[float]:
        """Times of a sampler, from most noise to least: n/x falls from ``sigma_max`` to
        ``sigma_min`` by equal factors.
        """
        most, least = (torch.tensor(sigma, dtype=torch.float64).log() for sigma in self.sigmas)
        ratios = torch.linspace(float(most), float(least), steps, dtype=torch.float64).exp()
        return (ratios.atan() * 2 / torch.pi).tolist()

    @staticmethod
    def step(noisy: Tensor, velocity: Tensor, time: float, after: float) -> Tensor:
        """Latents at the time ``after``, by DDIM (arXiv:2010.02502): the same data and noise, mixed
        anew.
        """
        turn = torch.tensor((after - time) * torch.pi / 2)
        return turn.cos() * noisy + turn.sin() * velocity


def _circle(levels_M: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, to be multiplied with latents like x."""
    angle = (levels_M * torch.pi / 2).to(x.device).view(-1, *[1] * (x.ndim - 1))
    return angle.cos().to(x), angle.sin().to(x)


@contextmanager
def _as_configured(config: Mapping[str, Any]) -> Iterator[None]:
    """What goes wrong inside is the fault of a configuration that came with weights."""
    steps = config.get("num_train_timesteps", 1000)
    try:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"num_train_timesteps is {steps!r}; expected a number, 1 or more")
        yield
    except Exception as error:
        raise ValueError(
            f"the {config.get('_class_name', 'scheduler')} of this configuration cannot be built "
            f"({type(error).__name__}: {error}). Compare it with that of its model: {dict(config)}"
        ) from error


def _check_table(table: Tensor, config: Mapping[str, Any]) -> None:
    """As diffusers takes nonsense without a word."""
    steps = config.get("num_train_timesteps", 1000)
    if len(table) != steps:
        raise ValueError(f"num_train_timesteps is {steps}, with {len(table)} noise levels")
    falls = bool((table.diff() <= 0).all())
    if not (falls and bool(table.isfinite().all()) and table.min() >= 0 and table.max() <= 1):
        raise ValueError("its noise levels do not fall from 1 to 0")


def noise_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The process that a model's scheduler tells of.

    Raises:
        ValueError: for a scheduler whose training is not known.
    """
    name = str(config.get("_class_name", ""))
    # By name alone: sampling makes an instance of the class.
    if name in FLOW_KINDS or (name in DDPM_KINDS and config.get("use_flow_sigmas")):
        return FlowNoise(config)
    if name in DDPM_KINDS:
        return DDPMNoise(config)
    if name in COSINE_KINDS:
        return CosineNoise(config)
    raise ValueError(
        f"the scheduler is {name or 'not named'}; how such a model is trained is known for "
        f"{[*DDPM_KINDS, *FLOW_KINDS, *COSINE_KINDS]}."
    )
