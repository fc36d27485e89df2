"""The memory that `mmfusion plan` expects of a strategy against what two ranks take, on this CPU.

    python -m tests.benchmarks.plan_strategies [--strategies ddp deepspeed_2]

Measured is each rank's own memory that is no file's (``RssAnon``), the most from the first training
step to the end of the second, less the same of a run whose LLM is tiny: so what libraries and
threads take is not in it. Both are runs of the recipe under the strategy, two processes over gloo,
in float32 and with gradient checkpointing; all of the LLM trains. Estimated is the plan's row.
DeepSpeed's buckets are small here: a CPU gives a buffer its memory where it is written, a GPU all
of it at once. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import lightning as L

from mmfusion.tools.plan.memory import Memory
from mmfusion.tools.plan.recipe import plan_recipe
from mmfusion.tools.plan.rows import own_row
from mmfusion.tools.plan.tables import COLUMNS
from tests.benchmarks.plan_memory import CODE, MALLOC, MIB, STEPS, llama, text_recipe

HERE = "tests.benchmarks.plan_strategies"
WORLD = 2
BUCKET = 10_000_000
"""Numbers of a bucket of DeepSpeed's."""
STRATEGIES = ("ddp", "deepspeed_2", "deepspeed_3", "fsdp2")
TINY = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}


def own_memory() -> int:
    """Bytes of this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.M)
    assert found
    return int(found[1]) * 1024


class Peak(L.Callback):
    """Writes the most memory of each rank's own in the steps; a checkpoint comes later.

    Args:
        folder: for a file a rank, in bytes.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.over, self.peak = Path(folder), threading.Event(), 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.watch = threading.Thread(target=self._watch, daemon=True)
        self.watch.start()

    def _watch(self) -> None:
        while not self.over.wait(0.005):
            self.peak = max(self.peak, own_memory())

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step < STEPS:
            return
        self.over.set()
        self.watch.join()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / str(trainer.global_rank)).write_text(str(self.peak))


def recipe(folder: Path, strategy: str, tiny: bool = False) -> list[str]:
    """Arguments of ``mmfusion fit`` and of the plan."""
    policy = {"class_path": "mmfusion.tuning.Full", "init_args": {"lr": 1e-4}}
    arguments = text_recipe(folder, policy, checkpointed=True)
    if tiny and not (folder / "tiny").exists():
        llama(folder / "tiny", **TINY)
    arguments += [
        "--data.pack_tokens=512", "--data.packs_per_step=2", "--data.lanes=2",
        f"--model.llm.init_args.path={folder / ('tiny' if tiny else 'llm')}",
    ]  # fmt: skip
    if not strategy.startswith("deepspeed"):
        return [*arguments, f"--strategy={strategy}"]
    config = {"zero_optimization": {"reduce_bucket_size": BUCKET}}
    given = {
        "class_path": "mmfusion.training.strategies.zero.ZeRO",
        "init_args": {"stage": int(strategy[-1]), "config": config},
    }
    return [*arguments, f"--trainer.strategy={json.dumps(given)}"]


def measured(arguments: list[str], folder: Path, name: str) -> list[int]:
    """Bytes that each rank of a run takes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    callback = {"class_path": f"{HERE}.Peak", "init_args": {"folder": str(folder / name)}}
    options = [
        f"--run_dir={folder}/run-{name}", "--resume=none", "--wandb=off", "--data.num_workers=0",
        "--trainer.devices=2", "--trainer.enable_progress_bar=false",
        f"--trainer.callbacks={json.dumps([callback])}",
    ]  # fmt: skip
    world = {
        "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": name,
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, "fit", *arguments, *options],
            env={**os.environ, **MALLOC, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(WORLD)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"{name}: a rank failed")
    return [int((folder / name / str(rank)).read_text()) for rank in range(WORLD)]


def compare(strategy: str, folder: Path) -> tuple[Memory, list[int]]:
    """(estimate, measured of each rank), in bytes."""
    row = own_row(plan_recipe(recipe(folder, strategy), WORLD, on_gpu=False), WORLD)
    assert row is not None
    small = measured(recipe(folder, strategy, tiny=True), folder, f"{strategy}-tiny")
    large = measured(recipe(folder, strategy), folder, strategy)
    return row, [most - least for most, least in zip(large, small, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategies", nargs="*", default=[*STRATEGIES], choices=STRATEGIES)
    with tempfile.TemporaryDirectory() as folder:
        for strategy in parser.parse_args().strategies:
            row, ranks = compare(strategy, Path(folder))
            detail = ", ".join(f"{name} {getattr(row, name) / MIB:,.0f}" for name in COLUMNS)
            found = ", ".join(f"{size / MIB:,.0f}" for size in ranks)
            print(f"{strategy}: estimated MiB: {detail}; measured {found}; ratio "
                  f"{row.total / max(ranks):.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
