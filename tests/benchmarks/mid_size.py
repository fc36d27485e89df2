"""Writes a recipe of middle size: a random LLaMA of 33 million parameters with LoRA, a small CLIP
and a projector, and shards whose samples are all as long, so that every pack is as much work.

    python -m tests.benchmarks.mid_size runs/mid_size

Random weights change no time. ``recipe.yaml`` is what the programs of this folder take that compare
numbers of processes; ``full.yaml`` is the same with every weight of the LLM trained.
"""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from mmfusion.data.writer import ShardWriter
from tests.models.tiny import clip_config, llama_config, save_llm

MODELS = "mmfusion.models"
SAMPLES = 512
WORDS = 95
PACK_TOKENS = 224
"""Two samples of 16 tokens of a picture, and 95 words."""


def save_vision(folder: Path) -> None:
    """A CLIP of 3 million parameters, 16 features a picture."""
    torch.manual_seed(1)
    config = clip_config(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        image_size=64, patch_size=16,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=64).save_pretrained(folder)


def save_pairs(folder: Path) -> None:
    """Pictures of noise, captions of as many words."""
    draw = random.Random(0)
    with ShardWriter(str(folder / "pairs-%05d.tar"), overwrite=True) as writer:
        for number in range(SAMPLES):
            picture = io.BytesIO()
            Image.frombytes("RGB", (64, 64), draw.randbytes(3 * 64 * 64)).save(picture, "JPEG")
            text = " ".join(f"w{draw.randrange(35)}" for _ in range(WORDS))
            writer.write(f"{number:05d}", {"jpg": picture.getvalue(), "txt": text.encode()})


def write(folder: Path, **llm: Any) -> Path:
    """Parts, shards and recipes in ``folder``.

    Args:
        folder: is made.
        llm: sizes of the LLM's configuration, in place of the usual ones.

    Returns:
        The recipe.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "initializer_range": 0.02,
    } | llm  # fmt: skip
    save_llm(folder / "llm", llama_config(**sizes))
    save_vision(folder / "clip")
    save_pairs(folder)
    full = {"class_path": "mmfusion.tuning.Full", "init_args": {"lr": 1e-4}}
    lora = {"class_path": "mmfusion.tuning.LoRA", "init_args": {"r": 16, "lr": 1e-4}}
    caption = {"class_path": "mmfusion.data.converters.caption.Caption"}
    recipe: dict[str, Any] = {
        "wandb": "off",
        "trainer": {
            "max_steps": 1000, "accelerator": "cpu", "gradient_clip_val": 1.0,
            "enable_progress_bar": False,
        },
        "model": {
            "encoders": {
                "image": {
                    "class_path": f"{MODELS}.encoders.hf_vision.HFVision",
                    "init_args": {"path": str(folder / "clip")},
                }
            },
            "input_projectors": {"image": {"class_path": f"{MODELS}.projectors.mlp.MLP"}},
            "llm": {
                "class_path": f"{MODELS}.llms.hf_causal_lm.HFCausalLM",
                "init_args": {"path": str(folder / "llm")},
            },
            "objectives": {
                "next_token": {"class_path": "mmfusion.objectives.next_token.NextToken"}
            },
            "tuning": {"input_projectors": full, "llm": lora},
            "schedule": {"warmup_steps": 2},
        },
        "data": {
            "sources": {"pairs": {"shards": str(folder / "pairs-*.tar"), "converter": caption}},
            "pack_tokens": PACK_TOKENS,
            "packs_per_step": 1,
            "packs_per_micro_batch": 1,
            "lanes": 2,
            "window": 16,
            "num_workers": 0,
        },
        "checkpoint": {"every_n_steps": 100_000},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    recipe["model"]["tuning"]["llm"] = full
    (folder / "full.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


if __name__ == "__main__":
    write(Path(sys.argv[1]))
