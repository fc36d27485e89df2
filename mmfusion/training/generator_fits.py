"""What a small generator learns, one after the other: its autoencoder, and its denoiser together
with its text encoder.

These are for generators small enough to be trained beside everything else (``mmfusion
train-generator``); published ones are taken as they are. M items.
"""

from __future__ import annotations

import logging
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from mmfusion.models.bfloat16 import computes_bfloat16
from mmfusion.models.generators.base import Generator
from mmfusion.models.generators.trainable import TrainablePipeline
from mmfusion.training.callbacks.step_bar import StepBar
from mmfusion.training.schedules import WarmupDecay


@dataclass(frozen=True)
class Effort:
    """How long something is trained.

    Args:
        steps: of the optimizer.
        batch: items a step.
        lr: peak rate of AdamW, after a warmup; it falls to 0.
        precision: of the Trainer; None takes bf16-mixed where that is fast.
    """

    steps: int
    batch: int = 16
    lr: float = 1e-3
    precision: Literal["bf16-mixed", "32-true"] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not 0 < self.lr < math.inf:
            raise ValueError(
                f"steps is {self.steps}, batch {self.batch}, lr {self.lr}; expected 1 or more, 1 "
                "or more, and a finite number above 0."
            )


class Fit(L.LightningModule, ABC):
    """A small thing that trains: whatever in it takes gradients."""

    def __init__(self, effort: Effort) -> None:
        super().__init__()
        self.effort = effort

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """() of a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log the loss as well."""
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a step that would make every weight NaN.

        Raises:
            FloatingPointError: where the gradients are not finite.
        """
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            raise FloatingPointError(
                f"{type(self).__name__}: the gradients of step {self.global_step} of "
                f"{self.effort.steps} are not finite; nothing of it is kept. Lower its lr "
                f"({self.effort.lr}), or look for weights or media that hold no numbers."
            )

    def configure_optimizers(self) -> Any:
        """AdamW, its rate by step."""
        optimizer = torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad],
            lr=self.effort.lr,
            betas=(0.9, 0.99),
            weight_decay=0.0,
        )
        schedule = WarmupDecay(final_ratio=0.0)(optimizer, self.effort.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class GeneratorFit(Fit):
    """Components of a generator.

    Args:
        effort: how long.
        generator: the parts that it needs are built.
        names: the components that train.

    Attributes:
        trained: those components, by their folders.
    """

    def __init__(self, effort: Effort, generator: TrainablePipeline, names: Sequence[str]) -> None:
        super().__init__(effort)
        self.generator: Any = generator
        kinds = generator.components
        self.trained = {kinds[name].folder: getattr(generator, name) for name in names}
        generator.requires_grad_(False)
        for module in self.trained.values():
            module.requires_grad_(True)

    def finish(self, items: Mapping[str, Tensor]) -> None:
        """Once all steps are done, with what it was trained on."""


class AutoencoderFit(GeneratorFit):
    """Absolute and squared error of what comes back, and a little of the divergence from a normal
    distribution, which keeps the latents in one range (arXiv:2112.10752).

    Args:
        effort: how long.
        generator: whose VAE trains; it is built.
        divergence: weight of the divergence.
    """

    def __init__(self, effort: Effort, generator: TrainablePipeline, divergence: float) -> None:
        super().__init__(effort, generator, ["vae"])
        self.divergence = divergence

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Of M targets' tensors."""
        given = self.generator.vae_input(batch)
        posterior = self.generator.vae.encode(given).latent_dist
        error = self.generator.reconstructed(posterior.sample()).float() - given
        divergence = posterior.kl().float().mean()
        return (error.abs() + error.square()).mean() + self.divergence * divergence

    def finish(self, items: Mapping[str, Tensor]) -> None:
        """Bring the latents to unit variance, as denoisers expect them.

        Raises:
            FloatingPointError: for latents that are not finite.
        """
        mean, std = moments(self.generator, items)
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise FloatingPointError(
                f"the latents of the autoencoder, once it is trained, are not finite; it is not "
                f"kept. Lower its lr ({self.effort.lr})."
            )
        self.generator.standardize(mean, std)


@torch.no_grad()
def moments(
    generator: Generator, tensors: Mapping[str, Tensor], together: int = 64
) -> tuple[Tensor, Tensor]:
    """Of the latents of all targets, so many at a time."""
    count = len(next(iter(tensors.values())))
    found = [
        generator.moments({name: t[start : start + together] for name, t in tensors.items()})
        for start in range(0, count, together)
    ]
    mean, std = (torch.cat(part) for part in zip(*found, strict=True))
    return mean, std


class DenoiserFit(GeneratorFit):
    """The generator's own loss under its own text encoding; both train. Some captions are left out,
    for classifier-free guidance.

    Args:
        effort: how long.
        generator: it is built.
        captions: of all items.
        unnamed: share of the captions that are left out.
        condition_noise: standard deviation of noise on what the denoiser is told, so that it bears
            conditioning that comes near a caption's encoding but is not quite it (conditioning
            augmentation, arXiv:2106.15282).
    """

    def __init__(
        self,
        effort: Effort,
        generator: TrainablePipeline,
        captions: Sequence[str],
        unnamed: float = 0.1,
        condition_noise: float = 0.0,
    ) -> None:
        super().__init__(effort, generator, ["denoiser", "text_encoder"])
        self.captions, self.unnamed = list(captions), unnamed
        self.condition_noise = condition_noise

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Of ``mean`` and ``std`` of M targets' latents, and ``index`` among the captions."""
        mean, std, index = batch["mean"], batch["std"], batch["index"].tolist()
        latents = self.generator.scaled(mean + std * torch.randn_like(mean))
        left_out = torch.rand(len(index)) < self.unnamed
        said = ["" if none else self.captions[i] for i, none in zip(index, left_out, strict=True)]
        keys = torch.randint(0, 2**62, (len(index),)).tolist()
        told = self.generator.encode_text(said)
        if self.condition_noise:
            noise = self.condition_noise * torch.randn_like(told.tokens)
            told = replace(told, tokens=told.tokens + noise)
        return self.generator.denoising_loss(latents, told, keys).mean()


def run_fit(fit: Fit, items: Mapping[str, Tensor], log_dir: Path, seed: int) -> None:
    """Train on items drawn at random.

    Args:
        fit: what is trained.
        items: tensors with one leading size, that of the items.
        log_dir: gets a folder with the losses, as CSV.
        seed: of weights that are made, order and noise.
    """
    L.seed_everything(seed, verbose=False)
    count = len(next(iter(items.values())))
    draws = torch.Generator().manual_seed(seed)
    order = RandomSampler(range(count), True, fit.effort.steps * fit.effort.batch, generator=draws)
    loader: Any = DataLoader(
        range(count),  # type: ignore[arg-type]
        fit.effort.batch,
        sampler=order,
        collate_fn=lambda chosen: {name: tensor[chosen] for name, tensor in items.items()},
    )
    with _quiet():
        _train(fit, loader, log_dir)
    fit.eval()


def _train(fit: Fit, loader: Any, log_dir: Path) -> None:
    usual: Literal["bf16-mixed", "32-true"] = "bf16-mixed" if computes_bfloat16() else "32-true"
    trainer = L.Trainer(
        max_steps=fit.effort.steps,
        precision=fit.effort.precision or usual,
        gradient_clip_val=1.0,
        logger=CSVLogger(log_dir, name=type(fit).__name__, version=""),
        log_every_n_steps=min(10, fit.effort.steps),
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[StepBar()],
        devices=1,
    )
    try:
        trainer.fit(fit.train(), loader)
    except SystemExit:  # Lightning's answer to Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's words about devices and tips, which are for a run of one's own."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")  # the other parts
        try:
            yield
        finally:
            logger.setLevel(before)
