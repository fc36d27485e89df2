"""Generators that ``mmfusion train-generator`` can train from nothing: their VAE and their text
encoder take gradients as well.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from mmfusion.models.generators.diffusers_pipeline import DiffusersPipeline
from mmfusion.types import MediaTensors


class TrainablePipeline(DiffusersPipeline):
    """A family whose ``encode_text`` is differentiable, and which says what its VAE sees."""

    @abstractmethod
    def vae_input(self, tensors: MediaTensors) -> Tensor:
        """What the VAE encodes, and gives back, of M targets."""

    def reconstructed(self, latents: Tensor) -> Tensor:
        """What the VAE decodes, like ``vae_input``."""
        return self.vae.decode(latents).sample

    def standardize(self, mean: Tensor, std: Tensor) -> None:
        """Let the built VAE's configuration say how its latents get unit variance.

        Args:
            mean: of the latents of M targets, (M, C, ...).
            std: of the same shape.
        """
        variance = float(mean.var() + std.square().mean())
        self.vae.register_to_config(scaling_factor=variance**-0.5)
