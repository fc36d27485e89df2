"""Whisper's encoder on short clips, against transformers' feature extractor and encoder."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder as HFWhisperEncoder

from mmfusion.models.encoders.whisper import WhisperEncoder, log_mel
from mmfusion.types import Media
from tests.models.tiny import save_clip

FULL = 100
"""Positions of the tiny model: 2 s."""


def config(positions: int = FULL) -> WhisperConfig:
    return WhisperConfig(
        vocab_size=20,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=positions,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        init_std=0.3,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    WhisperForConditionalGeneration(config()).save_pretrained(tmp_path)
    return tmp_path


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def wav(samples: int, rate: int = 16000, seed: int = 0) -> Media:
    file = io.BytesIO()
    soundfile.write(file, noise(samples, seed), rate, format="wav", subtype="FLOAT")
    return Media("audio", file.getvalue(), "wav")


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("samples", [1, 319, 320, 321, 24000, 479_900, 480_000])
def test_log_mel_is_the_beginning_of_whispers_own(samples: int, bins: int) -> None:
    features = -(-samples // 320)
    expected = WhisperFeatureExtractor(feature_size=bins)(noise(samples), sampling_rate=16000)
    found = log_mel(torch.from_numpy(noise(samples)), features, bins)
    assert found.shape == (bins, 2 * features)
    right = torch.tensor(expected["input_features"][0][:, : 2 * features])
    torch.testing.assert_close(found, right, atol=1e-5, rtol=0)


def test_a_clip_of_full_length_gives_transformers_features(folder: Path) -> None:
    encoder = WhisperEncoder(str(folder), max_seconds=2.0)
    encoder.build()
    processor = encoder.media_processor()
    tensors = processor.collate([processor(wav(32000))])
    reference = WhisperForConditionalGeneration.from_pretrained(folder).model.encoder.eval()
    torch.testing.assert_close(encoder(tensors), reference(tensors["mel"]).last_hidden_state)


def test_a_short_clip_gives_what_a_shorter_encoder_gives(folder: Path) -> None:
    encoder = WhisperEncoder(str(folder), max_seconds=2.0, silence_seconds=0)
    encoder.build()
    processor = encoder.media_processor()
    tensors = processor.collate([processor(wav(9700))])
    short = HFWhisperEncoder(config(positions=31)).eval()
    weights = encoder.encoder.state_dict()
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:31]
    short.load_state_dict(weights)
    assert tensors["mel"].shape == (1, 80, 62)
    torch.testing.assert_close(encoder(tensors), short(tensors["mel"]).last_hidden_state)


@pytest.mark.parametrize("pool", [1, 3])
def test_a_clip_gives_the_same_features_alone_and_in_a_batch(folder: Path, pool: int) -> None:
    encoder = WhisperEncoder(str(folder), max_seconds=2.0, pool=pool)
    encoder.build()
    processor = encoder.media_processor()
    clips = [wav(samples, seed=samples) for samples in (5000, 32000, 100, 12345)]
    items = [processor(clip) for clip in clips]
    together = encoder(processor.collate(items))
    for row, clip, item in zip(together, clips, items, strict=True):
        alone = encoder(processor.collate([item]))[0]
        assert len(alone) == processor.num_features(clip) == int(item["num_features"])
        torch.testing.assert_close(row[: len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_silence_is_encoded_after_the_clip_and_dropped(folder: Path) -> None:
    bare, padded = (WhisperEncoder(str(folder), 2.0, silence_seconds=s) for s in (0, 0.5))
    bare.build()
    padded.build()
    file = io.BytesIO()
    soundfile.write(file, np.pad(noise(9600), (0, 8000)), 16000, format="wav", subtype="FLOAT")
    longer = bare.media_processor()(Media("audio", file.getvalue(), "wav"))
    item = padded.media_processor()(wav(9600))
    assert (int(item["length"]), int(item["num_features"])) == (55, 30)
    torch.testing.assert_close(item["mel"], longer["mel"])
    found = padded(padded.media_processor().collate([item]))
    expected = bare(bare.media_processor().collate([longer]))[:, :30]
    torch.testing.assert_close(found, expected)


def test_pooling_is_the_mean_of_the_features_there_are(folder: Path) -> None:
    plain, pooled = (WhisperEncoder(str(folder), 2.0, pool) for pool in (1, 4))
    plain.build()
    pooled.build()
    item = plain.media_processor()(wav(320 * 10))
    features = plain(plain.media_processor().collate([item]))[0]
    expected = torch.stack([features[:4].mean(0), features[4:8].mean(0), features[8:].mean(0)])
    found = pooled(pooled.media_processor().collate([item]))[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("samples", [160, 4999, 12345, 200_000])
def test_num_features_from_the_header_is_what_encoding_gives(
    folder: Path, rate: int, samples: int
) -> None:
    encoder = WhisperEncoder(str(folder), max_seconds=1.5, pool=2)
    processor = encoder.media_processor()
    clip = wav(samples, rate)
    item = processor(clip)
    assert processor.num_features(clip) == int(item["num_features"])
    assert item["mel"].shape[1] == 2 * int(item["length"])
    assert int(item["clip"]) <= 75


def test_weights_load_from_the_whole_model_and_from_the_encoder_alone(
    folder: Path, tmp_path: Path
) -> None:
    whole = WhisperForConditionalGeneration.from_pretrained(folder)
    whole.model.encoder.save_pretrained(tmp_path / "encoder")
    for path in (folder, tmp_path / "encoder"):
        encoder = WhisperEncoder(str(path), 2.0)
        encoder.build()
        for name, value in whole.model.encoder.state_dict().items():
            assert torch.equal(encoder.encoder.state_dict()[name], value)


def test_a_missing_weight_is_refused_by_name(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.encoder.layers.1.fc2.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*layers\.1\.fc2\.bias"):
        WhisperEncoder(str(folder), 2.0).build()


def test_a_model_of_another_family_is_refused(tmp_path: Path) -> None:
    save_clip(tmp_path)
    with pytest.raises(ValueError, match="is a clip_vision_model model; expected a whisper one"):
        WhisperEncoder(str(tmp_path))


def test_more_seconds_than_positions_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_seconds is 30"):
        WhisperEncoder(str(folder), 30.0)


def test_the_idle_item_encodes(folder: Path) -> None:
    encoder = WhisperEncoder(str(folder), 2.0)
    encoder.build()
    processor = encoder.media_processor()
    assert encoder(processor.collate([processor.idle()])).isfinite().all()


@pytest.mark.slow
def test_silence_brings_the_real_encoder_nearer_to_its_features_of_30_seconds(
    assets: Path, real_weights: dict[str, Path]
) -> None:
    folder = real_weights["whisper-base-encoder"]
    file = min((assets / "speech").glob("*.ogg"))
    media = Media("audio", file.read_bytes(), "ogg")
    features = []
    for seconds in (0, 5, 30):
        encoder = WhisperEncoder(str(folder), silence_seconds=seconds)
        encoder.build()
        processor = encoder.media_processor()
        with torch.no_grad():
            features.append(encoder(processor.collate([processor(media)]))[0])
    near = [torch.cosine_similarity(x, features[2], dim=-1).mean() for x in features[:2]]
    assert 0.7 < near[0] < near[1]
    assert near[1] > 0.88
