"""Stable Diffusion by itself: prediction types, weights of the levels, any number of tokens."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("model_index.json", "unet", "x", "unet is 'x'; expected the library and the class"),
        ("model_index.json", "vae", {"a": 1}, "vae is {'a': 1}; expected the library"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0, "scheduler is 0; expected 1"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**13, "expected 1 to 100000"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "x", "is 'x'; expected 1 to"),
        ("vae/config.json", "scaling_factor", 0.0, "scaling_factor of its vae is 0.0; expected"),
        ("vae/config.json", "scaling_factor", None, "scaling_factor of its vae is None; expected"),
        ("vae/config.json", "scaling_factor", float("nan"), "of its vae is nan; expected"),
        ("vae/config.json", None, [1], "vae/config.json holds [1]; expected a JSON object"),
        ("unet/config.json", None, None, "unet/config.json (200000 bytes) cannot be read: max"),
    ],
)
def test_configurations_that_no_pipeline_has_are_refused_by_name(
    generator: StableDiffusion, tmp_path: Path, file: str, key: str, value: Any, message: str
) -> None:
    folder = shutil.copytree(generator.path, tmp_path / "sd")
    content = json.loads((folder / file).read_text())
    text = json.dumps({**content, key: value} if key else value)
    (folder / file).write_text("[" * 200_000 if value is key else text)
    with pytest.raises(ValueError, match=re.escape(message)):
        StableDiffusion(str(folder))


@pytest.mark.parametrize("part", ["text_encoder", "vae", "unet"])
def test_weights_that_are_no_numbers_are_refused_by_name(
    generator: StableDiffusion, tmp_path: Path, part: str
) -> None:
    folder = shutil.copytree(generator.path, tmp_path / "sd")
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[-1]
    weights[name].view(-1)[0] = torch.inf
    save_file(weights, file, metadata={"format": "pt"})
    message = f"1 weights of .* in {folder}/{part} are not finite: \\['{re.escape(name)}'"
    with pytest.raises(ValueError, match=message):
        StableDiffusion(str(folder)).build(PARTS)


def test_a_damaged_tokenizer_is_named(generator: StableDiffusion, tmp_path: Path) -> None:
    folder = shutil.copytree(generator.path, tmp_path / "sd")
    for file in (folder / "tokenizer").glob("*.json"):
        file.write_bytes(b"\xff{")
    with pytest.raises(ValueError, match=rf"{folder}/tokenizer/\S+\.json \(2 bytes\) cannot be"):
        StableDiffusion(str(folder)).tokenizer()
