"""Stable Diffusion by itself: prediction types, weights of the levels, any number of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from mmfusion.models.generators.base import PARTS, Sampling
from mmfusion.models.generators.noise import generators_of
from mmfusion.models.generators.stable_diffusion import StableDiffusion
from mmfusion.types import Conditioning
from tests.models.generators import tiny
from tests.models.generators.families import StableDiffusionFamily

KEYS = [5, 123456789]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction", "sample"])
def family(request: pytest.FixtureRequest) -> StableDiffusionFamily:
    return StableDiffusionFamily(request.param)


@pytest.fixture(scope="module")
def generator(
    family: StableDiffusionFamily, tmp_path_factory: pytest.TempPathFactory
) -> StableDiffusion:
    made = family.make(family.save(tmp_path_factory.mktemp("sd") / "pipeline"))
    made.build(PARTS)
    return made.requires_grad_(False).eval()


@pytest.mark.parametrize("min_snr", [0.0, 5.0])
def test_the_loss_is_that_of_the_documentation(
    family: StableDiffusionFamily, generator: StableDiffusion, min_snr: float
) -> None:
    latents, given = torch.randn(2, 4, 8, 8), generator.encode_text(["a", "b c"])
    found = generator.denoising_loss(latents, given, KEYS, 0, min_snr)
    scheduler = DDPMScheduler.from_pretrained(generator.path, subfolder="scheduler")
    for m, key in enumerate(KEYS):
        draw, x = generators_of([key], 0)[0], latents[m : m + 1]
        loss = family.loss(generator, x, Conditioning(given.tokens[m : m + 1]), draw)
        if min_snr:
            level = torch.randint(0, 100, (1,), generator=generators_of([key], 0)[0])
            alpha = scheduler.alphas_cumprod[level].squeeze()
            snr = alpha / (1 - alpha)
            least = torch.minimum(snr, torch.tensor(min_snr))
            weights = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}
            loss = loss * weights[str(family.prediction)]
        torch.testing.assert_close(found[m], loss, rtol=1e-4, atol=1e-6)


def test_where_nothing_is_left_of_the_signal_weights_are_those_of_ever_less(
    family: StableDiffusionFamily, tmp_path: Path
) -> None:
    assert family.prediction is not None
    path = tiny.save_stable_diffusion(tmp_path, family.prediction, rescale_betas_zero_snr=True)
    schedule = family.make(path).noise_schedule()
    weights = schedule.weights(torch.tensor([0, 99]), 5.0)
    assert schedule.scheduler.alphas_cumprod[99] == 0
    assert 0 < weights[0] <= 5
    assert float(weights[1]) == {"epsilon": 1, "v_prediction": 0, "sample": 0}[family.prediction]


def test_guidance_takes_any_number_of_tokens(generator: StableDiffusion) -> None:
    ours, empty = Conditioning(torch.randn(2, 5, 32)), generator.encode_text([""])
    pair = generator.paired(ours, empty)
    assert [given.tokens.shape for given in pair] == [(2, 60, 32)] * 2
    noisy, steps = torch.randn(2, 4, 8, 8), torch.tensor([3, 70])
    for repeated, given in zip(pair, (ours, empty), strict=True):
        once = Conditioning(given.tokens.expand(2, -1, -1))
        torch.testing.assert_close(
            generator.denoise(noisy, steps, repeated), generator.denoise(noisy, steps, once)
        )
    assert len(generator.sample(ours, empty, Sampling(steps=1))) == 2


def test_a_size_that_latents_do_not_divide_is_refused(generator: StableDiffusion) -> None:
    with pytest.raises(ValueError, match="size is 17; expected a multiple of 2"):
        StableDiffusion(generator.path, size=17)
