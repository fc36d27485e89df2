"""Tokens a second, MFU and memory of LLaVA-1.5-7B's stage 2 with LoRA (arXiv:2310.03744) on a GPU.

    python -m tests.benchmarks.llava_shape runs/llava_shape --gpu H100-80GB
    python -m tests.benchmarks.llava_shape runs/llava_shape --gpu H100-80GB --strategy deepspeed_3

Shapes and hyper-parameters are the published ones: CLIP ViT-L/14 at 336 pixels, an MLP of two
layers, LLaMA 7B in bfloat16 under LoRA of rank 128 on every linear layer, gradient checkpointing,
fused AdamW. The weights are random, which changes neither time nor memory; pictures are the few
small ones of the tests, whose 576 tokens each are as many as of any. It is the real ``mmfusion
fit``: rates are the medians of its own log after the first steps; FLOPs (with recomputation left
out) and the memory that is expected are those of ``mmfusion plan``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
)

from mmfusion.tools.plan.gpus import gpu_of
from mmfusion.tools.plan.memory import alone
from mmfusion.tools.plan.recipe import plan_recipe
from mmfusion.tools.plan.work import work
from mmfusion.training.command import RecipeCommand
from mmfusion.training.loggers import read_metrics
from tests.benchmarks.plan_memory import HERE
from tests.benchmarks.published_sizes import MODELS, save_pairs
from tests.models.tiny import save_tokenizer

WARMUP = 5
GIB = 1 << 30


def save_weights(folder: Path, layers: int, width: int) -> None:
    """CLIP and LLaMA, so deep and so wide; both as published with 32 layers of 4,096."""
    vision = CLIPVisionConfig(
        hidden_size=width // 4, intermediate_size=width, num_hidden_layers=max(2, layers * 3 // 4),
        num_attention_heads=max(1, width // 256), image_size=336, patch_size=14,
    )  # fmt: skip
    CLIPVisionModel(vision).save_pretrained(folder / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336).save_pretrained(
        folder / "clip"
    )
    llama = LlamaConfig(
        hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 128), num_key_value_heads=max(1, width // 128),
        vocab_size=32000, max_position_embeddings=4096, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(llama).to(torch.bfloat16).save_pretrained(folder / "llm")
    save_tokenizer(folder / "llm")


def recipe(folder: Path, packs: int, steps: int) -> Path:
    """Stage 2 with LoRA, on pictures with their captions."""
    converter = {
        "class_path": "mmfusion.data.converters.caption.Caption",
        "init_args": {"prompt": "w1"},
    }
    content = {
        "trainer": {"max_steps": steps, "precision": "bf16-mixed", "log_every_n_steps": 1},
        "model": {
            "encoders": {
                "image": {
                    "class_path": f"{MODELS}.encoders.hf_vision.HFVision",
                    "init_args": {"path": str(folder / "clip"), "dtype": "bfloat16"},
                }
            },
            "input_projectors": {"image": {"class_path": f"{MODELS}.projectors.mlp.MLP"}},
            "llm": {
                "class_path": f"{MODELS}.llms.hf_causal_lm.HFCausalLM",
                "init_args": {
                    "path": str(folder / "llm"),
                    "dtype": "bfloat16",
                    "gradient_checkpointing": True,
                },
            },
            "objectives": {
                "next_token": {"class_path": "mmfusion.objectives.next_token.NextToken"}
            },
            "tuning": {
                "input_projectors": {
                    "class_path": "mmfusion.tuning.Full",
                    "init_args": {"lr": 2e-5},
                },
                "llm": {
                    "class_path": "mmfusion.tuning.LoRA",
                    "init_args": {"r": 128, "alpha": 256, "dropout": 0.05, "lr": 2e-4},
                },
            },
            "optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"betas": [0.9, 0.999], "fused": True},
            },
            "schedule": {"warmup_steps": 1},
        },
        "data": {
            "sources": {"pairs": {"shards": f"{folder}/pairs-*.tar", "converter": converter}},
            "pack_tokens": 2048,
            "packs_per_step": packs,
            "packs_per_micro_batch": packs,
            "lanes": packs,
            "window": 8,
            "num_workers": 2,
        },
        "checkpoint": {"every_n_steps": steps},
        "wandb": "off",
    }
    path = folder / f"recipe-{packs}-{steps}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def measure(
    folder: Path, gpu: str, strategy: str | None, packs: int, steps: int, *options: str
) -> dict[str, float]:
    """Figures of a run of so many steps, without the first ones."""
    arguments = ["-c", str(recipe(folder, packs, steps)), *options]
    planned = plan_recipe(arguments, world=1, on_gpu=torch.cuda.is_available())
    done = work(
        planned.seen,
        planned.sizes,
        planned.frozen_parts,
        micro_batches=packs / planned.given.packs,
        tokens=packs * planned.given.pack_tokens,
        steps=steps,
        gpu=gpu_of(gpu),
        gpus=1,
        mfu=0.4,
    )
    run, allocated = folder / f"run-{strategy or 'alone'}-{packs}", folder / "allocated"
    arguments += [f"--run_dir={run}", "--resume=none"]
    arguments += [f"--strategy={strategy}"] if strategy else []
    if torch.cuda.is_available():
        callback = {"class_path": f"{HERE}.Allocated", "init_args": {"file": str(allocated)}}
        arguments.append(f"--trainer.callbacks={json.dumps([callback])}")
    RecipeCommand("fit", arguments)
    rows = [row for row in read_metrics(run / "metrics.csv") if "throughput/step_s" in row][WARMUP:]
    seconds = median(row["throughput/step_s"] for row in rows)
    found = {
        "tokens_per_s": median(row["throughput/tokens_per_s"] for row in rows),
        "step_s": seconds,
        "tflops_of_a_step": done.flops / 1e12,
        "mfu": done.flops / seconds / gpu_of(gpu).flops,
        "planned_gib": alone(planned.sizes, planned.seen).total / GIB,
    }
    if torch.cuda.is_available():
        found["allocated_gib"] = int(allocated.read_text()) / GIB
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpu", default="H100-80GB", help="as of mmfusion plan")
    parser.add_argument("--strategy", help="as of mmfusion fit; default: none")
    parser.add_argument("--packs", type=int, default=4, help="of 2,048 tokens, in a step")
    parser.add_argument("--steps", type=int, default=25)
    given = parser.parse_args()
    folder = given.folder.resolve()
    if not (folder / "llm" / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_pairs(folder)
        save_weights(folder, layers=32, width=4096)
    found = measure(folder, given.gpu, given.strategy, given.packs, given.steps)
    for name, value in found.items():
        print(f"{name}: {value:,.3f}")


if __name__ == "__main__":
    main()
