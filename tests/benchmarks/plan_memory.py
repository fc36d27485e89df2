"""The memory that `mmfusion plan` expects against what a run takes, on this CPU.

    python -m tests.benchmarks.plan_memory [--cases full checkpointed lora stage_1 stage_3]

Measured is the resident memory of the process that trains: its peak from the first training step on
(``VmHWM``, after a reset), less what it held before the model was built, with everything imported
and the data open. So it holds what tensors take, and what torch's kernels and Python take besides;
``malloc`` is told to give freed memory back at once, or yesterday's peak would count as today's.
Estimated is what the plan says without a strategy: weights, optimizer state, and the larger of the
backward pass and the optimizer's step. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from transformers import AutoModelForCausalLM

from mmfusion.data.writer import ShardWriter
from mmfusion.models.bfloat16 import computes_bfloat16
from mmfusion.tools.plan.memory import alone
from mmfusion.tools.plan.recipe import plan_recipe
from tests.models.tiny import llama_config, save_tokenizer

HERE = "tests.benchmarks.plan_memory"
MIB = 1 << 20
STEPS = 2
IMPORTS = "deepspeed, peft, transformers.models.llama.modeling_llama, torch._dynamo"
CODE = f"import {IMPORTS}; from mmfusion.cli import main; main()"
"""What a fit imports on its way would count as its memory."""
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"}


def llama(folder: Path, **changes: Any) -> str:
    """Configuration and weights of a random LLaMA of about 150 M parameters."""
    config = llama_config(
        **{
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "vocab_size": 16000,
            "max_position_embeddings": 2048,
            "initializer_range": 0.02,
            **changes,
        }
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def text_recipe(folder: Path, tuning: dict[str, Any], checkpointed: bool = False) -> list[str]:
    """A recipe of that LLaMA over long texts, as arguments of ``mmfusion fit``."""
    path = folder / "llm"
    if not path.exists():
        llama(path)
        draw = random.Random(0)
        with ShardWriter(str(folder / "texts-%06d.tar")) as writer:
            for i in range(40):
                words = " ".join(f"w{draw.randrange(35)}" for _ in range(500))
                writer.write(f"{i:05d}", {"txt": words.encode()})
    recipe = {
        "trainer": {"max_steps": STEPS, "accelerator": "cpu", "devices": 1},
        "model": {
            "encoders": {},
            "input_projectors": {},
            "llm": {
                "class_path": "mmfusion.models.llms.hf_causal_lm.HFCausalLM",
                "init_args": {"path": str(path), "gradient_checkpointing": checkpointed},
            },
            "objectives": {
                "next_token": {"class_path": "mmfusion.objectives.next_token.NextToken"}
            },
            "tuning": {"llm": tuning},
            "schedule": {"warmup_steps": 0},
        },
        "data": {
            "sources": {
                "texts": {
                    "shards": str(folder / "texts-*.tar"),
                    "converter": {"class_path": "tests.training.tiny.TinyConverter"},
                }
            },
            "pack_tokens": 1024,
            "packs_per_step": 1,
            "lanes": 1,
            "window": 4,
        },
    }
    file = folder / f"recipe{len([*folder.glob('recipe*')])}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return ["-c", str(file)]


def full(folder: Path) -> list[str]:
    return text_recipe(folder, {"class_path": "mmfusion.tuning.Full", "init_args": {"lr": 1e-4}})


def checkpointed(folder: Path) -> list[str]:
    policy = {"class_path": "mmfusion.tuning.Full", "init_args": {"lr": 1e-4}}
    return text_recipe(folder, policy, checkpointed=True)


def lora(folder: Path) -> list[str]:
    return text_recipe(folder, {"class_path": "mmfusion.tuning.LoRA", "init_args": {"lr": 1e-4}})


def quickstart(stage: str) -> list[str]:
    """Its recipe, with its real weights and data; where the CPU has no bfloat16, in fp32."""
    options = ["--model.compile=false", "--model.init_from=null", "--data.val_sources=null"]
    if not computes_bfloat16():
        options += ["--trainer.precision=32-true", "--model.llm.init_args.dtype=float32"]
        options += ["--model.encoders.audio.init_args.dtype=float32"]
    steps = [f"--trainer.max_steps={STEPS}", "--model.schedule.warmup_steps=0"]
    recipe = Path(__file__).parents[2] / "recipes/quickstart" / f"{stage}.yaml"
    return ["-c", str(recipe), *steps, *options]


CASES = {
    "full": full,
    "checkpointed": checkpointed,
    "lora": lora,
    "stage_1": lambda folder: quickstart("1_align_input"),
    "stage_3": lambda folder: quickstart("3_instruct"),
}


class Peak(L.Callback):
    """Writes the resident memory of a fit: before the model, and the most from its first step on.

    Args:
        file: JSON, in MiB.
    """

    def __init__(self, file: str) -> None:
        self.file, self.before = Path(file), 0.0

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.before = resident("VmRSS")

    def on_train_start(self, trainer: Any, module: Any) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak: loading is not training

    def on_train_end(self, trainer: Any, module: Any) -> None:
        found = {"before": self.before, "peak": resident("VmHWM")}
        self.file.write_text(json.dumps(found))


class Allocated(L.Callback):
    """Writes the most bytes that CUDA's allocator gave out after the first step.

    Args:
        file: for the number.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.file.write_text(str(torch.cuda.max_memory_allocated()))


def resident(field: str) -> float:
    """A field of this process's status, in MiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return int(found[1]) / 1024


def measured(arguments: list[str], folder: Path, run: Path) -> float:
    """MiB that training takes in a process of its own."""
    file = folder / "peak.json"
    callback = {"class_path": f"{HERE}.Peak", "init_args": {"file": str(file)}}
    options = [
        f"--run_dir={run}", "--resume=none", "--wandb=off", "--data.num_workers=0",
        "--trainer.enable_progress_bar=false", f"--trainer.callbacks={json.dumps([callback])}",
    ]  # fmt: skip
    subprocess.run(
        [sys.executable, "-c", CODE, "fit", *arguments, *options],
        env={**os.environ, **MALLOC},
        check=True,
    )
    found = json.loads(file.read_text())
    return found["peak"] - found["before"]


def estimated(arguments: list[str]) -> dict[str, float]:
    """MiB by the plan, for one process here."""
    found = plan_recipe(arguments, world=1, on_gpu=False)
    memory = alone(found.sizes, found.seen)
    names = ("parameters", "frozen", "gradients", "optimizer", "activations", "transient", "total")
    return {name: getattr(memory, name) / MIB for name in names}


def compare(case: str, folder: Path) -> tuple[dict[str, float], float]:
    """(estimate by purpose, measured), in MiB. The run is in the folder's ``run-CASE``."""
    arguments = CASES[case](folder)
    return estimated(arguments), measured(arguments, folder, folder / f"run-{case}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=[*CASES], choices=[*CASES])
    with tempfile.TemporaryDirectory() as folder:
        for case in parser.parse_args().cases:
            parts, found = compare(case, Path(folder))
            detail = ", ".join(f"{name} {size:,.0f}" for name, size in parts.items())
            print(f"{case}: estimated {parts['total']:,.0f} MiB ({detail}), measured {found:,.0f} "
                  f"MiB, ratio {parts['total'] / found:.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
