"""What is AudioLDM 2's own; what every family keeps to is in the contract."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import soundfile
import torch

from mmfusion.models.generators.audio_ldm_2 import AudioLDM2
from mmfusion.models.generators.base import PARTS, Sampling
from mmfusion.types import Conditioning
from tests.models.generators.tiny_sound import save_audio_ldm_2


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> AudioLDM2:
    folder = save_audio_ldm_2(tmp_path_factory.mktemp("audio") / "pipeline")
    made = AudioLDM2(folder, t5_tokens=6, window=128)
    made.build(PARTS)
    return made.requires_grad_(False).eval()


def test_samples_are_those_of_the_pipeline(generator: AudioLDM2) -> None:
    given, empty = generator.encode_text(["a b", "c"]), generator.encode_text([""])
    found = generator.sample(given, empty, Sampling(3, 2.5, 7))
    pipeline = diffusers.AudioLDM2Pipeline.from_pretrained(generator.path, feature_extractor=None)
    none, empty_t5 = generator.streams(empty)
    states, t5 = generator.streams(given)
    expected = pipeline(
        prompt_embeds=t5.tokens,
        attention_mask=t5.mask.long(),
        negative_prompt_embeds=empty_t5.tokens.expand(2, -1, -1),
        negative_attention_mask=empty_t5.mask.long().expand(2, -1),
        generated_prompt_embeds=states,
        negative_generated_prompt_embeds=none.expand(2, -1, -1),
        num_inference_steps=3,
        guidance_scale=2.5,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
        audio_length_in_s=generator.clip.seconds,
    ).audios
    for media, wave in zip(found, expected, strict=True):
        samples, _ = soundfile.read(io.BytesIO(media.data), dtype="float32")
        torch.testing.assert_close(
            torch.from_numpy(samples), torch.from_numpy(wave), atol=1e-3, rtol=0
        )


def test_a_caption_is_encoded_as_it_is_alone(generator: AudioLDM2) -> None:
    both, alone = generator.encode_text(["a b c", "q"]), generator.encode_text(["q"])
    torch.testing.assert_close(both.tokens[1:], alone.tokens)
    assert torch.equal(both.mask[1:], alone.mask)


def test_what_the_u_net_does_not_see_is_zero_and_has_no_gradient(generator: AudioLDM2) -> None:
    tokens = torch.randn(1, 10, 32, requires_grad=True)
    latents = torch.randn(1, 4, 8, 4)
    generator.denoising_loss(latents, Conditioning(tokens), [1]).sum().backward()
    seen = tokens.grad[0] != 0
    assert seen[:4, :16].any(1).all()
    assert seen[4:].any(1).all()
    assert not seen[:4, 16:].any()
    assert not generator.encode_text(["a"]).tokens[0, :4, 16:].any()


def test_conditioning_without_room_for_both_streams_is_refused(generator: AudioLDM2) -> None:
    with pytest.raises(ValueError, match="has 4 tokens, of which AudioLDM 2 takes 4"):
        generator.streams(Conditioning(torch.zeros(1, 4, 32)))


def test_pipelines_of_another_shape_are_refused(generator: AudioLDM2, tmp_path: Path) -> None:
    path = shutil.copytree(generator.path, tmp_path / "pipeline")
    with pytest.raises(ValueError, match="t5_tokens is 0"):
        AudioLDM2(str(path), t5_tokens=0)
    file = Path(path) / "unet" / "config.json"
    one = {**json.loads(file.read_text()), "cross_attention_dim": [[None, 32], [None, 32]]}
    file.write_text(json.dumps(one))
    with pytest.raises(ValueError, match=r"streams of the widths \[32\]; expected two"):
        AudioLDM2(str(path))
