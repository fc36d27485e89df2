"""Writes a recipe of stage 1 and one of stage 2 whose frozen parts have published sizes: CLIP
ViT-L/14, 224 px (arXiv:2103.00020) and the two text encoders of Stable Diffusion XL
(arXiv:2307.01952). Their weights are random, which changes no time; the LLM is the quickstart's.

    python -m tests.benchmarks.published_sizes runs/published_sizes
    python -m tests.benchmarks.stored_features runs/published_sizes/1.yaml --fp32 --steps 8
    python -m tests.benchmarks.stored_features runs/published_sizes/2.yaml --fp32 --steps 8
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import yaml
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from mmfusion.data.writer import ShardWriter
from tests.models.generators.tiny import CLIP_TOKENS, clip_tokenizer

ASSETS = Path("tests/assets")
MODELS = "mmfusion.models"


def save_vision(folder: Path) -> None:
    """CLIP ViT-L/14."""
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=224, patch_size=14,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224).save_pretrained(folder)


def save_pictures(folder: Path) -> None:
    """Both text encoders whole; of the denoiser and the VAE what is read before they are built, at
    the widths they have, as alignment alone needs neither.
    """
    shared = {
        "vocab_size": len(CLIP_TOKENS), "max_position_embeddings": 77, "bos_token_id": 0,
        "eos_token_id": 1,
    }  # fmt: skip
    first = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        projection_dim=768, **shared,
    )  # fmt: skip
    second = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
        projection_dim=1280, hidden_act="gelu", **shared,
    )  # fmt: skip
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 77
    denoiser = UNet2DConditionModel(
        sample_size=128, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=2048,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        AutoencoderKL(latent_channels=4), CLIPTextModel(first), CLIPTextModelWithProjection(second),
        tokenizer, tokenizer, denoiser, EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip


def save_pairs(folder: Path) -> None:
    """The pictures that are committed, with their captions."""
    entries = json.loads((ASSETS / "manifest.json").read_text())
    with ShardWriter(str(folder / "pairs-%05d.tar"), overwrite=True) as writer:
        for number, entry in enumerate(entries):
            picture = (ASSETS / entry["picture"]).read_bytes()
            record = {"jpg": picture, "txt": entry["caption"].encode()}
            writer.write(f"{number:05d}", record)


def recipe(
    folder: Path, converter: str, init_args: dict[str, object], **model: object
) -> dict[str, object]:
    """What both stages share, and the parts of one."""
    part = {"class_path": f"mmfusion.data.converters.{converter}", "init_args": init_args}
    return {
        "trainer": {"max_steps": 100},
        "model": {
            "llm": {
                "class_path": f"{MODELS}.llms.hf_causal_lm.HFCausalLM",
                "init_args": {"path": "$MMFUSION_CACHE/weights/smollm2-135m-instruct"},
            },
            **model,
        },
        "data": {
            "sources": {"pairs": {"shards": str(folder / "pairs-*.tar"), "converter": part}},
            "pack_tokens": 220,
            "packs_per_step": 1,
            "packs_per_micro_batch": 1,
            "lanes": 1,
            "window": 16,
        },
    }


def main(folder: Path) -> None:
    """Write weights, pairs and both recipes."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_vision(folder / "clip-vit-large")
    save_pictures(folder / "stable-diffusion-xl")
    save_pairs(folder)
    full = {"class_path": "mmfusion.tuning.Full", "init_args": {"lr": 1e-4}}
    next_token = {"class_path": "mmfusion.objectives.next_token.NextToken"}
    first = recipe(
        folder,
        "caption.Caption",
        {"prompt": "Image caption:"},
        encoders={
            "image": {
                "class_path": f"{MODELS}.encoders.hf_vision.HFVision",
                "init_args": {"path": str(folder / "clip-vit-large")},
            }
        },
        input_projectors={
            "image": {
                "class_path": f"{MODELS}.projectors.mlp.MLP",
                "init_args": {"stack": 16, "norm": True},
            }
        },
        objectives={"next_token": next_token},
        tuning={"input_projectors": full},
    )
    second = recipe(
        folder,
        "text_to_media.TextToMedia",
        {"prompts": {"image": ["Draw {caption}"]}},
        encoders={},
        input_projectors={},
        signal_tokens={"image": 4},
        output_projectors={
            "image": {"class_path": f"{MODELS}.output_projectors.query_decoder.QueryDecoder"}
        },
        generators={
            "image": {
                "class_path": f"{MODELS}.generators.stable_diffusion_xl.StableDiffusionXL",
                "init_args": {"path": str(folder / "stable-diffusion-xl")},
            }
        },
        objectives={
            "next_token": next_token,
            "align_image": {
                "class_path": "mmfusion.objectives.condition_alignment.ConditionAlignment",
                "init_args": {"modality": "image"},
            },
        },
        tuning={
            "output_projectors": full,
            "llm": {"class_path": "mmfusion.tuning.NewTokens", "init_args": {"lr": 1e-4}},
        },
    )
    for name, made in (("1", first), ("2", second)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
