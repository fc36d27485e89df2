"""What is AudioLDM's own; what every family keeps to is in the contract."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
import soundfile
import torch
from diffusers import AudioLDMPipeline, DDPMScheduler
from torch.nn import functional as F

from mmfusion.models.generators.audio_ldm import AudioLDM
from mmfusion.models.generators.base import DENOISER, PARTS, VAE, Sampling
from mmfusion.models.generators.griffin_lim import GriffinLim
from mmfusion.models.generators.noise import generators_of
from mmfusion.types import Conditioning, Media
from tests.models.generators.tiny_sound import save_audio_ldm

KEYS = [5, 123456789]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_audio_ldm(tmp_path_factory.mktemp("audio") / "pipeline")


@pytest.fixture(scope="module")
def generator(folder: str) -> AudioLDM:
    made = AudioLDM(folder, window=128)
    made.build(PARTS)
    return made.requires_grad_(False).eval()


def latents_of(generator: AudioLDM, assets: Path) -> torch.Tensor:
    processor = generator.target_processor()
    clips = [processor(sound(assets, name)) for name in ("apple", "house")]
    return generator.encode_media(processor.collate(clips), generators_of(KEYS, 1))


def sound(assets: Path, name: str) -> Media:
    return Media("audio", (assets / "speech" / f"{name}.ogg").read_bytes(), "ogg")


def test_the_conditioning_is_the_pipelines_own_unit_vector(generator: AudioLDM) -> None:
    captions = ["a b c", "", "d"]
    found = generator.encode_text(captions).tokens
    assert found.shape == (3, generator.spec.tokens, generator.spec.dim) == (3, 1, 32)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, 1))
    pipeline = AudioLDMPipeline.from_pretrained(generator.path)
    expected = pipeline._encode_prompt(captions, "cpu", 1, False)
    torch.testing.assert_close(found[:, 0], expected)


def test_the_loss_is_the_u_nets_under_the_vector_as_class_label(
    generator: AudioLDM, assets: Path
) -> None:
    conditioning, latents = generator.encode_text(["a", "b c"]), latents_of(generator, assets)
    found = generator.denoising_loss(latents, conditioning, KEYS)
    scheduler = DDPMScheduler.from_pretrained(generator.path, subfolder="scheduler")
    for m, key in enumerate(KEYS):
        draw = generators_of([key], 0)[0]
        step = torch.randint(0, 100, (1,), generator=draw)
        noise = torch.randn(latents[m].shape, generator=draw)[None]
        alpha = scheduler.alphas_cumprod[step]
        noisy = alpha.sqrt() * latents[m : m + 1] + (1 - alpha).sqrt() * noise
        label = conditioning.tokens[m]
        predicted = generator.denoiser(
            noisy, step, encoder_hidden_states=None, class_labels=label
        ).sample
        torch.testing.assert_close(found[m], F.mse_loss(predicted, noise), rtol=1e-4, atol=1e-6)


def test_latents_are_drawn_from_the_scaled_posterior_of_the_mel_frames(
    generator: AudioLDM, assets: Path
) -> None:
    mel = generator.target_processor()(sound(assets, "apple"))["mel"]
    posterior = generator.vae.encode(mel[None, None]).latent_dist
    noise = torch.randn(4, 8, 4, generator=generators_of(KEYS, 1)[0])
    expected = 0.25 * (posterior.mean[0] + posterior.std[0] * noise)
    torch.testing.assert_close(latents_of(generator, assets)[0], expected)


def test_the_length_of_the_conditioning_does_not_matter(generator: AudioLDM, assets: Path) -> None:
    latents, tokens = latents_of(generator, assets), torch.randn(2, 1, 32)
    once, twice = (
        generator.denoising_loss(latents, Conditioning(scale * tokens), KEYS) for scale in (1, 2)
    )
    torch.testing.assert_close(once, twice)
    sampling, empty = Sampling(2, 3.0, 1), generator.encode_text([""])
    first, second = (
        generator.sample(Conditioning(scale * tokens), empty, sampling) for scale in (1, 2)
    )
    assert [media.data for media in first] == [media.data for media in second]


def test_samples_are_what_the_pipeline_makes_of_the_same_vector(generator: AudioLDM) -> None:
    given, empty = generator.encode_text(["a b", "c"]), generator.encode_text([""])
    found = generator.sample(given, empty, Sampling(3, 2.5, 7))
    pipeline = AudioLDMPipeline.from_pretrained(generator.path)
    seeds = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    expected = pipeline(
        ["a b", "c"], negative_prompt=["", ""], num_inference_steps=3, guidance_scale=2.5,
        generator=seeds, audio_length_in_s=generator.clip.seconds,
    ).audios  # fmt: skip
    for media, wave in zip(found, expected, strict=True):
        samples, rate = soundfile.read(io.BytesIO(media.data), dtype="float32")
        assert (rate, len(samples)) == (4000, 16 * 64)
        torch.testing.assert_close(
            torch.from_numpy(samples), torch.from_numpy(wave), atol=1e-3, rtol=0
        )


def test_training_does_not_load_the_vocoder(folder: str) -> None:
    generator = AudioLDM(folder)
    generator.build({VAE, DENOISER})
    assert generator.vocoder is None
    assert generator.text_encoder is None


def test_seconds_are_rounded_up_to_whole_latents(folder: str) -> None:
    clip = AudioLDM(folder, seconds=0.5).clip
    assert (clip.rate, clip.hop, clip.bins) == (4000, 64, 8)
    assert clip.frames == 32  # of 31.25, by 2
    assert AudioLDM(folder, seconds=0.512).clip.frames == 32
    assert AudioLDM(folder).clip.seconds == 0.256


def test_pipelines_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = Path(save_audio_ldm(tmp_path / "pipeline"))

    def change(part: str, **values: object) -> None:
        file = path / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    with pytest.raises(ValueError, match="seconds is -1"):
        AudioLDM(str(path), seconds=-1)
    change("unet", sample_size=None)
    with pytest.raises(ValueError, match=r"seconds is 0\.0; expected more than 0"):
        AudioLDM(str(path))
    change("vocoder", model_in_dim=9)
    with pytest.raises(ValueError, match="divides by 2, its vocoder takes 9 mel bins"):
        AudioLDM(str(path), seconds=1)
    change("vae", latent_channels=3)
    with pytest.raises(ValueError, match="takes latents of width 4, its VAE gives 3"):
        AudioLDM(str(path), seconds=1)
    change("text_encoder", projection_dim=31)
    with pytest.raises(ValueError, match="takes conditioning of width 32"):
        AudioLDM(str(path), seconds=1)
    change("unet", class_embed_type="projection")
    with pytest.raises(ValueError, match="class_embed_type 'projection'"):
        AudioLDM(str(path), seconds=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_heard_through_griffin_lim(
    folder: str, tmp_path: Path, dtype: Literal["bfloat16", "float16"]
) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "pipeline"))
    shutil.rmtree(path / "vocoder")
    own = {"sampling_rate": 4000, "upsample_rates": [8, 8], "model_in_dim": 8, "window": 128}
    GriffinLim(**own, iterations=2).save_pretrained(path / "vocoder")
    index = path / "model_index.json"
    vocoder = {"vocoder": ["diffusers", "GriffinLim"]}
    index.write_text(json.dumps({**json.loads(index.read_text()), **vocoder}))
    half = AudioLDM(str(path), window=128, dtype=dtype)
    half.build(PARTS)
    given = Conditioning(F.normalize(torch.randn(1, 1, 32), dim=-1))
    (made,) = half.sample(given, half.encode_text([""]), Sampling(steps=2))
    wave, rate = soundfile.read(io.BytesIO(made.data))
    assert (len(wave), rate) == (16 * 64, 4000)
    assert 0 < abs(wave).max() < 10
