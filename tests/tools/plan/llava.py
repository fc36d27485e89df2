"""LLaVA-1.5 7B as a recipe of configurations alone: no weight of it exists.

python -m tests.tools.plan.llava runs/llava && mmfusion plan runs/llava/recipe.yaml
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import CLIPVisionConfig, LlamaConfig

from tests.models.tiny import save_tokenizer

PROJECTOR = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
"""Of two layers: 21.0 M, as published."""
LLM = 6_738_415_616
"""Vicuna 7B's, and LLaMA 7B's."""


def write_llava(folder: Path, **changes: Any) -> str:
    """Stage 1: the projector trains, CLIP ViT-L/14 at 336 pixels and the LLM are frozen, bfloat16.

    Args:
        folder: of its files.
        changes: of the LLM's configuration.
    """
    llama = {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
        **changes,
    }  # fmt: skip
    LlamaConfig(**llama).save_pretrained(folder / "llm")
    save_tokenizer(folder / "llm")
    CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14,
    ).save_pretrained(folder / "clip")  # fmt: skip
    pictures = {"crop_size": 336, "size": {"shortest_edge": 336}, "do_center_crop": True}
    pictures |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    (folder / "clip/preprocessor_config.json").write_text(json.dumps(pictures))
    models = "mmfusion.models"
    recipe = {
        "run_dir": str(folder / "run"),
        "wandb": "off",
        "trainer": {"max_steps": 2180, "precision": "bf16-mixed"},
        "model": {
            "encoders": {
                "image": {
                    "class_path": f"{models}.encoders.hf_vision.HFVision",
                    "init_args": {"path": str(folder / "clip"), "dtype": "bfloat16"},
                }
            },
            "input_projectors": {
                "image": {"class_path": f"{models}.projectors.mlp.MLP", "init_args": {"depth": 2}}
            },
            "llm": {
                "class_path": f"{models}.llms.hf_causal_lm.HFCausalLM",
                "init_args": {"path": str(folder / "llm"), "dtype": "bfloat16"},
            },
            "objectives": {
                "next_token": {"class_path": "mmfusion.objectives.next_token.NextToken"}
            },
            "tuning": {
                "input_projectors": {
                    "class_path": "mmfusion.tuning.Full",
                    "init_args": {"lr": 1e-3},
                }
            },
        },
        "data": {
            "sources": {
                "pairs": {
                    "shards": str(folder / "pairs-*.tar"),
                    "converter": {"class_path": "mmfusion.data.converters.caption.Caption"},
                }
            },
            "pack_tokens": 2048,
            "packs_per_step": 80,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


if __name__ == "__main__":
    print(write_llava(Path(sys.argv[1])))
