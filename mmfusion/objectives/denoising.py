"""The generator's own training loss under the projected conditioning: what its U-Net or transformer
gets wrong tells the LLM what the words left out. M targets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE, Generator, check_seed
from mmfusion.models.generators.noise import generators_of
from mmfusion.objectives.base import Loss, TargetObjective, over_targets
from mmfusion.types import Batch, Conditioning, ConditioningSpec, ModelOutput, TargetBatch


class Denoising(TargetObjective):
    """Squared error of the generator's prediction, as it was trained itself (see its
    ``noise_schedule``). Gradients reach the conditioning, and the generator only where a tuning
    policy trains it.

    Args:
        modality: of the targets.
        weight: of this loss in the sum.
        min_snr: gamma of min-SNR weights (arXiv:2303.09556; 5 is usual); 0 weighs all levels alike.
        drop_condition: share of the targets whose conditioning is replaced by the encoding of "",
            for classifier-free guidance. Only of use where the generator trains as well.
        seed: of the noise, with each target's own key.
    """

    def __init__(
        self,
        modality: str,
        weight: float = 1.0,
        min_snr: float = 0.0,
        drop_condition: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(modality, weight)
        if not 0 <= drop_condition < 1 or not 0 <= min_snr < math.inf:
            raise ValueError(
                f"drop_condition is {drop_condition} and min_snr {min_snr}; expected a share below "
                "1 and a gamma of 0 or more."
            )
        check_seed("seed", seed)
        self.min_snr, self.seed = min_snr, seed
        self.drop_condition = drop_condition
        self.needs = frozenset({VAE, DENOISER} | ({TEXT_ENCODER} if drop_condition else set()))

    def check(self, generator: Generator, given: ConditioningSpec) -> None:
        schedule = generator.noise_schedule()
        try:
            if self.drop_condition:
                generator.check_paired(given)
            schedule.weights(schedule.draw([torch.Generator()]), self.min_snr)
        except ValueError as error:
            raise ValueError(
                f"Denoising of {self.modality} by {type(generator).__name__}: {error}"
            ) from error

    def forward(self, model: AnyToAnyModel, output: ModelOutput, batch: Batch) -> Loss:
        generator, target = model.generator(self.modality), batch.host.targets[self.modality]
        found = output.conditioning[self.modality]
        trains = any(p.requires_grad for p in generator.parameters())
        divided = f"generators.{self.modality}.{DENOISER}" in model.divided
        if target.idle and not trains and not divided:
            return over_targets(0.0 * found.tokens.sum((1, 2)), target, len(batch.samples))
        keys = target.keys.tolist()
        tensors = batch.targets[self.modality].tensors
        latents = generator.encode_media(tensors, generators_of(keys, self.seed + 1))
        if self.drop_condition:
            found = self._dropped(found, generator, target)
        losses = generator.denoising_loss(latents, found, keys, self.seed, self.min_snr)
        # What an idle target loses is 0, but its graph is that of any other.
        losses = losses * (0.0 if target.idle else 1.0)
        return over_targets(losses, target, len(batch.samples))

    def _dropped(
        self, found: Conditioning, generator: Generator, target: TargetBatch
    ) -> Conditioning:
        """Some conditioning replaced, as each target's key says."""
        draws = [
            torch.rand((), generator=g) for g in generators_of(target.keys.tolist(), ~self.seed)
        ]
        keep = (torch.stack(draws) >= self.drop_condition).to(found.tokens.device)
        ours, none = generator.paired(found, generator.encode_empty())

        def mixed(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(keep.view(-1, *[1] * (a.ndim - 1)), a, b.to(a))

        pooled = mask = None
        if ours.pooled is not None and none.pooled is not None:
            pooled = mixed(ours.pooled, none.pooled)
        if ours.mask is not None or none.mask is not None:
            mask = mixed(ours.valid, none.valid)
        return Conditioning(mixed(ours.tokens, none.tokens), pooled, mask)
