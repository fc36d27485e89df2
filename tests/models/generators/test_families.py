"""What single families refuse, and what is theirs alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmfusion.models.generators.audio_ldm import AudioLDM
from mmfusion.models.generators.base import DENOISER, PARTS, TEXT_ENCODER, VAE, Sampling
from mmfusion.models.generators.noise import FlowNoise, noise_schedule
from mmfusion.models.generators.pixart import PixArt
from mmfusion.models.generators.stable_audio import StableAudio
from mmfusion.models.generators.stable_diffusion import StableDiffusion
from mmfusion.models.generators.stable_diffusion_3 import StableDiffusion3
from mmfusion.models.generators.stable_diffusion_xl import StableDiffusionXL
from mmfusion.models.generators.text_to_video_sd import TextToVideoSD
from mmfusion.models.generators.wan import Wan
from mmfusion.models.output_projectors.query_decoder import QueryDecoder
from mmfusion.tuning import LoRA
from mmfusion.types import Captions, Conditioning, ConditioningSpec
from tests.models.generators import tiny, tiny_sound
from tests.models.generators.families import (
    Family,
    StableDiffusionFamily,
    StableDiffusionXLFamily,
)

CLIP_L = {"max_position_embeddings": 77, "hidden_size": 768}
CLIP_H = {"max_position_embeddings": 77, "hidden_size": 1024}


def test_sdxl_refuses_float16_where_its_vae_overflows(tmp_path: Path) -> None:
    path = tiny.save_stable_diffusion_xl(tmp_path / "xl")
    with pytest.raises(ValueError, match=r"float16, in which the VAE of .* overflows"):
        StableDiffusionXL(path, dtype="float16")
    config = Path(path) / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": False}))
    assert StableDiffusionXL(path, dtype="float16").dtype == torch.float16


@pytest.mark.parametrize(
    "family", [StableDiffusionFamily("v_prediction"), StableDiffusionXLFamily()]
)
def test_rescaled_guidance_draws_what_the_pipeline_draws_with_it(
    tmp_path: Path, family: Family
) -> None:
    path = family.save(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=r"guidance_rescale is 1\.5; expected 0 to 1"):
        family.make(path, guidance_rescale=1.5)
    ours, none = family.encoded(path, ["a b"])
    pipeline = diffusers.DiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for rescale in (0.0, 0.7, 1.0):
        generator = family.make(path, guidance_rescale=rescale)
        generator.build(PARTS)
        (made,) = generator.sample(ours, none, Sampling(steps=3, guidance_scale=6.0, seed=7))
        expected = pipeline(
            "a b", num_inference_steps=3, guidance_scale=6.0, guidance_rescale=rescale,
            height=16, width=16, generator=torch.Generator().manual_seed(7),
        )  # fmt: skip
        drawn.append(family.decoded(made))
        wanted = torch.from_numpy(np.asarray(expected.images[0], dtype=np.float32))
        assert (drawn[-1] - wanted).abs().max() <= 1
    assert (drawn[1] - drawn[0]).abs().mean() > 1
    assert (drawn[2] - drawn[1]).abs().mean() > 0.3


@pytest.mark.parametrize("empty_is_zero", [True, False])
def test_sdxl_encodes_no_words_as_it_was_trained(tmp_path: Path, empty_is_zero: bool) -> None:
    path = tiny.save_stable_diffusion_xl(tmp_path / "xl")
    index = Path(path) / "model_index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps({**values, "force_zeros_for_empty_prompt": empty_is_zero}))
    generator = StableDiffusionXL(path)
    generator.build({"text_encoder"})
    found = generator.encode_text(["a", ""])
    assert found.pooled is not None
    for part in (found.tokens, found.pooled):
        assert part[0].abs().sum() > 0
        assert (part[1].abs().sum() == 0) == empty_is_zero


def test_sd3_needs_as_many_tokens_as_its_text_encoding(tmp_path: Path) -> None:
    generator = StableDiffusion3(tiny.save_stable_diffusion_3(tmp_path / "sd3"), t5_tokens=6)
    generator.build(PARTS)
    ours = Conditioning(torch.randn(1, 5, 32), torch.randn(1, 24))
    with pytest.raises(ValueError, match='the encoding of "" has, 18; got 5'):
        generator.sample(ours, generator.encode_text([""]), Sampling(steps=1))


def test_wan_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    path = tiny.save_wan(tmp_path / "wan")
    with pytest.raises(ValueError, match="num_frames is 6; expected one more than a multiple of 4"):
        Wan(path, 16, 16, num_frames=6)
    with pytest.raises(ValueError, match="width is 24; expected a multiple of 16"):
        Wan(path, 16, 24)
    index = Path(path) / "model_index.json"
    values = json.loads(index.read_text())
    for change in ({"boundary_ratio": 0.9}, {"expand_timesteps": True}):
        index.write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=r"is Wan 2\.2"):
            Wan(path, 16, 16, 5)


def test_a_new_vae_in_bfloat16_is_made_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generator = StableDiffusion(tiny.save_stable_diffusion(tmp_path / "sd"), dtype="bfloat16")
    logging.getLogger("diffusers").addHandler(caplog.handler)
    generator.build({VAE}, pretrained=False)
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert generator.vae.dtype == torch.bfloat16
    assert not caplog.records


def test_pixart_takes_the_class_name_and_settings_of_old_pipelines(tmp_path: Path) -> None:
    path = tiny.save_pixart(tmp_path / "pixart")
    index, config = Path(path) / "model_index.json", Path(path) / "transformer" / "config.json"
    values = json.loads(index.read_text())
    values["transformer"] = ["diffusers", "Transformer2DModel"]
    index.write_text(json.dumps(values))
    old = {"_class_name": "Transformer2DModel", "double_self_attention": False}
    config.write_text(json.dumps({**json.loads(config.read_text()), **old}))
    generator = PixArt(path)
    for pretrained in (False, True):
        generator.denoiser = None
        generator.build({"denoiser"}, pretrained)
        assert type(generator.denoiser).__name__ == "PixArtTransformer2DModel"


def test_pixart_is_not_sampled_in_one_step(tmp_path: Path) -> None:
    """diffusers takes that for a distilled model's; it is known before anything is loaded."""
    generator = PixArt(tiny.save_pixart(tmp_path / "pixart"))
    with pytest.raises(ValueError, match=r"sampling\.steps is 1; expected 2 or more"):
        generator.check(Sampling(steps=1))
    generator.check(Sampling(steps=2))
    generator.build(PARTS)
    given = Conditioning(torch.randn(1, 120, 32))
    with pytest.raises(ValueError, match=r"sampling\.steps is 1; expected 2 or more"):
        generator.sample(given, generator.encode_text([""]), Sampling(steps=1))


def test_what_draws_away_from_zeros_takes_any_number_of_tokens(tmp_path: Path) -> None:
    """To drop conditioning it needs as many as its text encoding has."""
    sounds = StableAudio(tiny_sound.save_stable_audio(tmp_path / "sounds"))
    given = ConditioningSpec(3, sounds.spec.dim)
    sounds.check_drawn(given)
    with pytest.raises(ValueError, match=r"got 3"):
        sounds.check_paired(given)
    pictures = StableDiffusion3(tiny.save_stable_diffusion_3(tmp_path / "sd3"), t5_tokens=6)
    with pytest.raises(ValueError, match=r"got 3"):
        pictures.check_drawn(ConditioningSpec(3, 32, 24))


def test_weights_that_are_no_safetensors_are_not_opened(tmp_path: Path) -> None:
    path = Path(tiny.save_stable_diffusion(tmp_path / "sd"))
    for folder, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = path / folder / f"{name}.safetensors"
        old = "pytorch_model" if name == "model" else name
        torch.save(load_file(file), file.with_name(f"{old}.bin"))
        file.unlink()
        with pytest.raises(OSError, match="safetensors"):
            StableDiffusion(str(path)).build({{"unet": "denoiser"}.get(folder, folder)})


def test_a_frozen_text_encoder_has_no_dropout_beside_a_denoiser_that_trains(tmp_path: Path) -> None:
    generator = PixArt(tiny.save_pixart(tmp_path / "pixart"))
    generator.build({TEXT_ENCODER, DENOISER})
    generator.requires_grad_(False)
    assert generator.text_encoder.config.dropout_rate > 0
    given = Captions(["a b"], {})
    still = generator.eval().encode_captions(given).tokens
    LoRA(1e-3, r=2).attach("denoiser", generator.denoiser)
    generator.train()
    assert generator.denoiser.training
    assert generator.encode_captions(given).tokens.equal(still)
    assert not generator.eval().denoiser.training


def test_a_stored_encoding_of_no_words_is_where_the_generator_is(tmp_path: Path) -> None:
    generator = StableDiffusion(tiny.save_stable_diffusion(tmp_path / "sd"))
    stored = generator.stored_empty = Conditioning(torch.ones(1, 12, 32))
    assert generator.encode_empty().tokens.equal(stored.tokens)  # nothing is built
    generator.build({DENOISER})
    assert generator.to("meta").encode_empty().tokens.is_meta


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_may_be_loaded_in_another_precision_than_the_recipe_s(
    tmp_path: Path, dtype: Literal["float32", "bfloat16"]
) -> None:
    generator = StableDiffusion(tiny.save_stable_diffusion(tmp_path / "sd"), dtype=dtype)
    generator.build(PARTS)
    generator.to(torch.bfloat16 if dtype == "float32" else torch.float32)
    given = Conditioning(torch.randn(1, 12, 32))
    assert generator.denoising_loss(torch.randn(1, 4, 8, 8), given, [1]).isfinite().all()
    assert len(generator.sample(given, generator.encode_text([""]), Sampling(steps=1))) == 1


def test_code_that_comes_with_a_tokenizer_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(tiny.save_stable_diffusion(tmp_path / "sd"))
    config = path / "tokenizer" / "tokenizer_config.json"
    remote = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", None]}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **remote}))
    marker = tmp_path / "ran"
    (path / "tokenizer" / "odd.py").write_text(f"open({str(marker)!r}, 'w')\nclass Odd: ...\n")
    monkeypatch.setattr("builtins.input", lambda _: "y")  # what transformers would ask
    generator = StableDiffusion(str(path))
    generator.build({TEXT_ENCODER})
    with pytest.raises(ValueError, match="custom code"):
        generator.encode_text(["a"])
    assert not marker.exists()


def test_a_scheduler_is_known_by_its_class() -> None:
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    with pytest.raises(ValueError, match="the scheduler is DiffusionPipeline; how such a model"):
        noise_schedule({**config, "_class_name": "DiffusionPipeline"})


def test_a_flow_that_predicts_something_else_is_refused() -> None:
    config = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}
    with pytest.raises(ValueError, match="'epsilon' in a scheduler of flow matching"):
        noise_schedule({**config, "prediction_type": "epsilon"})
    with pytest.raises(ValueError, match="prediction_type is 'flow_prediction'; expected one of"):
        noise_schedule({**config, "use_flow_sigmas": False, "prediction_type": "flow_prediction"})


def test_flow_times_lean_to_the_noise_by_the_shift_of_either_scheduler() -> None:
    draws = [torch.Generator().manual_seed(seed) for seed in range(2000)]
    plain = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    shifted = {**plain, "shift": 3.0}
    sampler = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}
    means = []
    for config in (plain, shifted, sampler, {**shifted, "use_dynamic_shifting": True}):
        schedule = noise_schedule(config)
        assert isinstance(schedule, FlowNoise)
        levels = schedule.draw([g.manual_seed(seed) for seed, g in enumerate(draws)])
        x, n = torch.zeros(len(levels), 1), torch.ones(len(levels), 1)
        times = schedule.noised(x, n, levels)[:, 0]
        torch.testing.assert_close(schedule.timesteps(levels), times * 1000)
        means.append(float(times.mean()))
    assert means[0] == pytest.approx(0.5, abs=0.02)
    assert means[1] == pytest.approx(0.71, abs=0.03)
    assert means[2] == means[1]
    assert means[3] == means[0]
    with pytest.raises(ValueError, match="FlowNoise has no signal-to-noise weights"):
        schedule.weights(levels, 5.0)


@pytest.mark.parametrize(
    ("save", "kind", "text", "denoiser", "expected"),
    [
        (tiny.save_stable_diffusion, StableDiffusion, CLIP_L, 768, (77, 768)),
        (tiny.save_stable_diffusion, StableDiffusion, CLIP_H, 1024, (77, 1024)),
        (tiny.save_text_to_video_sd, TextToVideoSD, CLIP_H, 1024, (77, 1024)),
        (tiny_sound.save_audio_ldm, AudioLDM, {"projection_dim": 512}, 512, (1, 512)),
    ],
    ids=["sd-1", "sd-2", "zeroscope", "audioldm"],
)
def test_a_query_decoder_has_the_queries_and_the_width_of_a_published_generator(
    tmp_path: Path, save: Any, kind: Any, text: dict[str, int], denoiser: int, expected: Any
) -> None:
    """By their configurations alone: those of the text encoder and of the U-Net."""
    path = Path(save(tmp_path / "pipeline"))
    width = "projection_class_embeddings_input_dim" if kind is AudioLDM else "cross_attention_dim"
    for folder, values in (("text_encoder", text), ("unet", {width: denoiser})):
        file = path / folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    spec = kind(str(path)).spec
    assert (spec.tokens, spec.dim, spec.pooled_dim) == (*expected, 0)
    with torch.device("meta"):
        projector = QueryDecoder(4096, spec)  # of a 7B LLM
        found = projector.project(torch.empty(2, 4, 4096))
    assert tuple(projector.queries.shape) == (expected[0], 512)
    assert tuple(found.tokens.shape) == (2, *expected)
