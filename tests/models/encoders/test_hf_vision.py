"""HFVision against transformers' own classes and image processor."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from mmfusion.models.encoders.hf_vision import HFVision
from mmfusion.types import Media
from tests.models.tiny import clip_config, save_clip


def png(height: int, width: int) -> tuple[Image.Image, Media]:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.save(file, "png")
    return image, Media("image", file.getvalue(), "png")


@pytest.mark.parametrize("size", [(40, 60), (61, 37), (224, 224), (17, 300), (640, 480)])
def test_preprocessing_equals_transformers(tmp_path: Path, size: tuple[int, int]) -> None:
    settings = {"size": {"shortest_edge": 24}, "crop_size": {"height": 16, "width": 16}}
    reference = CLIPImageProcessorPil(**settings)
    save_clip(tmp_path)
    reference.save_pretrained(tmp_path)
    image, media = png(*size)
    found = HFVision(str(tmp_path)).media_processor()(media)["pixels"]
    expected = torch.tensor(np.asarray(reference(image)["pixel_values"][0]))
    # Resizing rounds to 8 bit; torch and PIL may round one step apart.
    step = 1 / 255 / min(reference.image_std) * 1.001
    difference = (found - expected).abs()
    assert difference.max() <= step
    assert (difference > 1e-5).float().mean() < 0.02


@pytest.mark.parametrize("layer", [-1, -2])
def test_features_are_clip_hidden_states_without_the_class_token(
    tmp_path: Path, layer: int
) -> None:
    encoder = HFVision(save_clip(tmp_path), feature_layer=layer)
    processor = encoder.media_processor()
    encoder.build()
    _, media = png(30, 20)
    tensors = processor.collate([processor(media)])
    clip = CLIPVisionModel.from_pretrained(tmp_path)
    states = clip(tensors["pixels"], output_hidden_states=True).hidden_states[layer]
    assert torch.equal(encoder(tensors), states[:, 1:])
    assert processor.num_features(media) == 4 == states.shape[1] - 1
    full = HFVision(str(tmp_path), layer, select="full")
    full.build()
    assert torch.equal(full(tensors), states)
    assert full.media_processor().num_features(media) == 5


def test_a_whole_clip_checkpoint_loads_its_vision_part(tmp_path: Path) -> None:
    whole = CLIPModel(
        CLIPConfig(
            vision_config=clip_config().to_dict(),
            text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        )
    ).eval()
    whole.save_pretrained(tmp_path)
    encoder = HFVision(str(tmp_path), feature_layer=-1)
    encoder.build()
    pixels = torch.randn(2, 3, 16, 16)
    states = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(encoder({"pixels": pixels}), states[:, 1:])


TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.mark.parametrize(
    ("model", "config", "prefix"),
    [
        (SiglipVisionModel, SiglipVisionConfig(**TINY), 0),
        (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**TINY, num_register_tokens=3), 4),
        (ViTModel, ViTConfig(**TINY), 1),
    ],
)
def test_other_families_give_their_patches(
    tmp_path: Path, model: type, config: object, prefix: int
) -> None:
    options = {"add_pooling_layer": False} if model is ViTModel else {}
    model(config, **options).save_pretrained(tmp_path)
    encoder = HFVision(str(tmp_path))
    encoder.build()
    assert encoder.num_prefix == prefix
    assert encoder({"pixels": torch.randn(2, 3, 16, 16)}).shape == (2, 4, 16)


@pytest.mark.parametrize("size", [(300, 400), (260, 256)])
def test_dinov2_takes_the_size_that_its_preprocessor_makes(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    """Its usual settings: trained on 518, pictures of 256, of which the middle 224 is taken."""
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**{**TINY, "image_size": 518, "patch_size": 14})).save_pretrained(
        tmp_path
    )
    reference = BitImageProcessorPil(size={"shortest_edge": 256}, crop_size=224)
    reference.save_pretrained(tmp_path)
    image, media = png(*size)
    pixels = torch.tensor(np.asarray(reference(image)["pixel_values"]))
    model = Dinov2Model.from_pretrained(tmp_path).eval()
    for select, first in (("patch", 1), ("full", 0)):
        encoder = HFVision(str(tmp_path), feature_layer=-1, select=select)
        processor = encoder.media_processor()
        encoder.build()
        tensors = processor.collate([processor(media)])
        assert tensors["pixels"].shape == pixels.shape == (1, 3, 224, 224)
        assert processor.idle()["pixels"].shape == (3, 224, 224)
        assert (tensors["pixels"] - pixels).abs().max() < 0.03  # two steps of 8 bit
        features = encoder(tensors)
        expected = model(tensors["pixels"], output_hidden_states=True).hidden_states[-1][:, first:]
        assert torch.equal(features, expected)
        assert processor.num_features(media) == features.shape[1] == 16 * 16 + 1 - first


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"image_mean": None}, "image_mean is None; expected three numbers"),
        ({"image_std": [1.0]}, r"image_std is \[1.0\]; expected three numbers"),
        ({"image_mean": [1, None, 1]}, "preprocessor_config.json of"),
        ({"crop_size": None}, "crop_size is None; expected a number, or height and width"),
        ({"crop_size": 17}, r"crop_size \(17, 17\) does not fit into size 16"),
        ({"do_center_crop": False}, "pictures would differ in size"),
        ({"do_resize": False}, "do_resize is false"),
        ({"size": {"longest_edge": 16}}, "size is .*; expected a number, or height and width"),
        ({"crop_size": 8}, "makes pictures of 8 x 8, which CLIPVisionModel of image_size 16"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused_by_file_and_key(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    save_clip(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    settings = {**json.loads(file.read_text()), **changes}
    file.write_text(
        json.dumps({key: value for key, value in settings.items() if value is not None})
    )
    with pytest.raises(ValueError, match=problem) as error:
        HFVision(str(tmp_path)).media_processor()
    assert str(file.parent) in str(error.value)


def test_settings_may_leave_out_scaling_and_normalising(tmp_path: Path) -> None:
    reference = CLIPImageProcessorPil(
        size={"height": 16, "width": 16},
        do_center_crop=False,
        do_rescale=False,
        do_normalize=False,
    )
    save_clip(tmp_path)
    reference.save_pretrained(tmp_path)
    image, media = png(16, 16)
    found = HFVision(str(tmp_path)).media_processor()(media)["pixels"]
    expected = torch.tensor(np.asarray(reference(image)["pixel_values"][0])).float()
    torch.testing.assert_close(found, expected)


def test_a_missing_weight_is_refused_by_name(tmp_path: Path) -> None:
    save_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layers.1.mlp.fc1.weight"))
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*layers\.1\.mlp\.fc1\.weight"):
        HFVision(str(tmp_path)).build()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        HFVision(str(tmp_path / "nothing"))
