"""A tiny pipeline from disk against what the diffusers documentation says of training."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch.nn import functional as F

from mmfusion.models.generators.base import PARTS, Sampling
from mmfusion.models.generators.noise import generators_of
from mmfusion.models.generators.stable_diffusion import StableDiffusion
from mmfusion.types import Conditioning, Media
from tests.models.generators.tiny import save_stable_diffusion

KEYS = [5, 123456789]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction", "sample"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_stable_diffusion(tmp_path_factory.mktemp("sd") / "pipeline", request.param)


@pytest.fixture
def generator(folder: str) -> StableDiffusion:
    made = StableDiffusion(folder)
    made.build(PARTS)
    return made.requires_grad_(False).eval()


def picture(seed: int = 0) -> Media:
    values = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "png")
    return Media("image", file.getvalue(), "png")


def pixels(generator: StableDiffusion) -> dict[str, torch.Tensor]:
    processor = generator.target_processor()
    return processor.collate([processor(picture(i)) for i in range(2)])


def test_the_specification_is_that_of_the_text_encoding(generator: StableDiffusion) -> None:
    found = generator.encode_text(["a b", ""])
    assert found.tokens.shape == (2, generator.spec.tokens, generator.spec.dim) == (2, 12, 32)
    pipeline = StableDiffusionPipeline.from_pretrained(
        generator.path, safety_checker=None, feature_extractor=None, image_encoder=None
    )
    expected = pipeline.encode_prompt(["a b", ""], "cpu", 1, False)[0]
    torch.testing.assert_close(found.tokens, expected)


@pytest.mark.parametrize("min_snr", [0.0, 5.0])
def test_the_loss_is_that_of_the_documentation(generator: StableDiffusion, min_snr: float) -> None:
    tensors = pixels(generator)
    conditioning = generator.encode_text(["a", "b c"])
    latents = generator.encode_media(tensors, generators_of(KEYS, 1))
    found = generator.denoising_loss(latents, conditioning, KEYS, 0, min_snr)
    scheduler = DDPMScheduler.from_pretrained(generator.path, subfolder="scheduler")
    for m, key in enumerate(KEYS):
        draw = torch.Generator().manual_seed(key)
        step = torch.randint(0, 100, (1,), generator=draw)
        noise = torch.randn(latents[m].shape, generator=draw)[None]
        x = latents[m : m + 1]
        # diffusers/examples/text_to_image/train_text_to_image.py, in words of one item
        alpha = scheduler.alphas_cumprod[step]
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        tokens = conditioning.tokens[m : m + 1]
        predicted = generator.denoiser(noisy, step, encoder_hidden_states=tokens).sample
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * x
        kind = scheduler.config.prediction_type
        wanted = {"epsilon": noise, "v_prediction": velocity, "sample": x}[kind]
        loss = F.mse_loss(predicted, wanted)
        if min_snr:
            snr = alpha / (1 - alpha)
            least = torch.minimum(snr, torch.tensor(min_snr))
            loss = (
                loss
                * {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[kind]
            )
        torch.testing.assert_close(found[m], loss.squeeze(), rtol=1e-4, atol=1e-6)


def test_latents_are_drawn_from_the_scaled_posterior(generator: StableDiffusion) -> None:
    tensors = pixels(generator)
    found = generator.encode_media(tensors, generators_of(KEYS, 1))
    posterior = generator.vae.encode(tensors["pixels"].float() / 127.5 - 1).latent_dist
    for m, key in enumerate(KEYS):
        draw = torch.Generator().manual_seed(key ^ 1)
        noise = torch.randn(posterior.mean[m].shape, generator=draw)
        expected = 0.25 * (posterior.mean[m] + posterior.std[m] * noise)
        torch.testing.assert_close(found[m], expected)


def test_gradients_reach_the_conditioning_and_nothing_frozen(generator: StableDiffusion) -> None:
    tokens = torch.randn(2, 12, 32, requires_grad=True)
    latents = generator.encode_media(pixels(generator), generators_of(KEYS, 1))
    loss = generator.denoising_loss(latents, Conditioning(tokens), KEYS)
    loss.sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().sum() > 0
    assert all(p.grad is None for p in generator.parameters())


def test_noise_follows_from_the_key_alone(generator: StableDiffusion) -> None:
    conditioning = generator.encode_text(["a", "b"])
    latents = generator.encode_media(pixels(generator), generators_of(KEYS, 1))
    both = generator.denoising_loss(latents, conditioning, KEYS)
    alone = generator.denoising_loss(latents[1:], Conditioning(conditioning.tokens[1:]), KEYS[1:])
    torch.testing.assert_close(both[1:], alone)
    other = generator.denoising_loss(latents, conditioning, [KEYS[0], 7])
    assert other[0] == both[0]
    assert other[1] != both[1]


def test_sampling_runs_from_our_conditioning(generator: StableDiffusion) -> None:
    tokens = torch.randn(2, 12, 32)
    sampling = Sampling(steps=3, guidance_scale=4.0, seed=7)
    empty = generator.encode_text([""])
    found = generator.sample(Conditioning(tokens), empty, sampling)
    assert [Image.open(io.BytesIO(media.data)).size for media in found] == [(16, 16)] * 2
    again = generator.sample(Conditioning(tokens), empty, sampling)
    assert [media.data for media in again] == [media.data for media in found]
    (first,) = generator.sample(Conditioning(tokens[:1]), empty, sampling)
    one, both = (np.asarray(Image.open(io.BytesIO(m.data))).astype(int) for m in (first, found[0]))
    assert np.abs(one - both).max() <= 1


def test_only_the_parts_that_are_needed_are_loaded(folder: str) -> None:
    generator = StableDiffusion(folder)
    generator.build({"vae"})
    assert generator.vae is not None
    assert generator.text_encoder is None
    assert generator.denoiser is None


def test_a_missing_weight_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(save_stable_diffusion(tmp_path / "sd"))
    for part, name in (
        ("unet/diffusion_pytorch_model.safetensors", "conv_in.bias"),
        ("vae/diffusion_pytorch_model.safetensors", "encoder.conv_in.bias"),
    ):
        weights = load_file(path / part)
        del weights[name]
        save_file(weights, path / part, {"format": "pt"})
        with pytest.raises(ValueError, match=name):
            StableDiffusion(str(path)).build(PARTS)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_pipelines_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = Path(save_stable_diffusion(tmp_path / "sd"))
    change(path / "scheduler" / "scheduler_config.json", _class_name="EDMEulerScheduler")
    with pytest.raises(ValueError, match="the scheduler is EDMEulerScheduler"):
        StableDiffusion(str(path))
    change(
        path / "scheduler" / "scheduler_config.json",
        _class_name="DDIMScheduler",
        prediction_type="x",
    )
    with pytest.raises(ValueError, match="prediction_type is 'x'"):
        StableDiffusion(str(path))
    change(path / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    change(path / "unet" / "config.json", cross_attention_dim=48)
    with pytest.raises(
        ValueError, match="takes conditioning of width 48, its text encoder gives 32"
    ):
        StableDiffusion(str(path))
    with pytest.raises(FileNotFoundError, match="no folder"):
        StableDiffusion(f"{path}/absent")
    (path / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no vae/config\.json"):
        StableDiffusion(str(path))
