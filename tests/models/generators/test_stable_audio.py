"""What is Stable Audio's own; what every family keeps to is in the contract."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mmfusion.models.generators.base import PARTS, Sampling
from mmfusion.models.generators.noise import CosineNoise, noise_schedule
from mmfusion.models.generators.stable_audio import StableAudio
from mmfusion.types import Conditioning
from tests.models.generators.tiny_sound import save_stable_audio

OWN = {"_class_name": "CosineDPMSolverMultistepScheduler", "prediction_type": "v_prediction"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_stable_audio(tmp_path_factory.mktemp("audio") / "pipeline")


def test_a_perfect_prediction_leads_back_to_the_data() -> None:
    """Through all steps of the sampler, and by the preconditioning of diffusers' scheduler."""
    schedule = CosineNoise(OWN)
    draw = torch.Generator().manual_seed(0)
    x, n = torch.randn(2, 1, 3, 4, generator=draw).double()
    times = schedule.sampled(7)
    assert times == sorted(times, reverse=True)
    latents = schedule.noised(x, n, torch.tensor([times[0]]).double())
    for time, after in zip(times, [*times[1:], 0.0], strict=True):
        level = torch.tensor([time]).double()
        velocity = schedule.target(x, n, level)
        sigma = torch.tan(level * torch.pi / 2)
        data = latents / (1 + sigma**2).sqrt() - sigma / (1 + sigma**2).sqrt() * velocity
        torch.testing.assert_close(data, x)
        latents = schedule.step(latents, velocity, time, after)
    torch.testing.assert_close(latents, x, atol=1e-5, rtol=0)


def test_levels_of_the_sampler_fall_from_sigma_max_to_sigma_min_by_equal_factors() -> None:
    times = torch.tensor(CosineNoise(OWN).sampled(5), dtype=torch.float64)
    sigmas = torch.tan(times * torch.pi / 2)
    torch.testing.assert_close(sigmas[[0, -1]], torch.tensor([500, 0.3]).double())
    factors = sigmas[1:] / sigmas[:-1]
    torch.testing.assert_close(factors, factors[:1].expand(4))


def test_weights_are_those_of_min_snr_for_v_prediction() -> None:
    schedule, levels = CosineNoise(OWN), torch.tensor([0.0, 0.2, 0.5, 0.9])
    snr = (torch.cos(levels * torch.pi / 2) / torch.sin(levels * torch.pi / 2)) ** 2
    expected = snr.clamp(max=5) / (snr + 1)
    found = schedule.weights(levels, 5.0)
    torch.testing.assert_close(found[1:], expected[1:])
    assert found[0] == 0
    assert schedule.weights(levels, 0.0).tolist() == [1] * 4


def test_schedulers_of_another_training_are_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prediction_type is 'epsilon'; expected 'v_prediction'"):
        noise_schedule({**OWN, "prediction_type": "epsilon"})
    with pytest.raises(ValueError, match=r"sigma_data is 0\.5; expected 1"):
        noise_schedule({**OWN, "sigma_data": 0.5})
    path = Path(shutil.copytree(folder, tmp_path / "pipeline"))
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match="is DDIMScheduler; Stable Audio is trained as Cosine"):
        StableAudio(str(path))


def test_a_clip_is_followed_by_silence_and_its_end_is_told(folder: str) -> None:
    generator = StableAudio(folder, seconds=0.02, text_tokens=6)
    generator.build(PARTS)
    generator.requires_grad_(False).eval()
    assert generator.target_processor().idle()["samples"].shape == (80,)
    waves = torch.randn(1, 80)
    whole = torch.nn.functional.pad(waves, (0, 48))
    found, expected = (generator.moments({"samples": each})[0] for each in (waves, whole))
    torch.testing.assert_close(found, expected)
    longer = StableAudio(folder, text_tokens=6)
    longer.build(PARTS)
    given, latents = Conditioning(torch.randn(1, 6, 8)), torch.randn(1, 3, 16)
    time = torch.tensor([0.5])
    short, long = (each.denoise(latents, time, given) for each in (generator, longer))
    assert not torch.allclose(short, long)


def test_dropped_conditioning_is_what_sampling_leads_away_from(folder: str) -> None:
    generator = StableAudio(folder, text_tokens=6)
    generator.build(PARTS)
    generator.requires_grad_(False).eval()
    seen: list[dict[str, torch.Tensor]] = []
    generator.denoiser.register_forward_pre_hook(
        lambda module, _, given: seen.append(given), with_kwargs=True
    )
    ours, empty = generator.encode_text(["a b"]), generator.encode_empty()
    generator.sample(ours, empty, Sampling(steps=1, guidance_scale=3.0))
    both = Conditioning(torch.cat([empty.tokens, ours.tokens]))
    generator.denoise(torch.randn(2, 3, 16), torch.full((2,), 0.5), both)
    sampled, trained = seen
    for name in ("encoder_hidden_states", "global_hidden_states"):
        assert trained[name].equal(sampled[name])
    assert not trained["encoder_hidden_states"][0].any()  # as the pipeline's, start and end too
    assert trained["encoder_hidden_states"][1, -2:].any()
    assert trained["global_hidden_states"][0].any()


def test_lengths_that_do_not_fit_are_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"seconds is 1; expected at most 0\.03"):
        StableAudio(folder, seconds=1)
    two, six = (Conditioning(torch.zeros(1, count, 8)) for count in (2, 6))
    with pytest.raises(ValueError, match="takes as many tokens as its text encoding has, 6; got 2"):
        StableAudio(folder, text_tokens=6).paired(two, six)
