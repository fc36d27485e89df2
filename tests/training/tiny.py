"""Tiny runs: a random LLaMA on disk, shards of words with media of a few bytes, a recipe."""

from __future__ import annotations

import csv
import json
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from mmfusion.cli import main
from mmfusion.data.converters.base import Converter
from mmfusion.data.writer import ShardWriter
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.projectors.base import Projector
from mmfusion.objectives.base import Loss
from mmfusion.objectives.next_token import NextToken
from mmfusion.training import sharded
from mmfusion.training.callbacks.checkpointing import RunCheckpoint
from mmfusion.training.checkpoint import REQUIRED_KEYS
from mmfusion.training.run import RunDirectory
from mmfusion.training.sharded import REST
from mmfusion.types import Batch, Media, Message, ModelOutput, Sample, Text
from tests.models.tiny import save_llm

TINY = "tests.models.tiny"
HERE = "tests.training.tiny"


class TinyConverter(Converter):
    """``image`` and ``audio`` members are media of a user turn, ``txt`` is the answer."""

    def __call__(self, record: Mapping[str, bytes], shard: str, key: str) -> Sample:
        media = [Media(name, record[name], "bin") for name in ("image", "audio") if name in record]
        turn = Message("user", (*media, Text(" w1")))
        answer = Message("assistant", (Text(record["txt"].decode()),))
        return Sample((turn, answer), shard=shard, key=key)


class Recorder(L.Callback):
    """Writes which samples, with which tokens, each rank trained on in each optimizer step."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, batch_idx: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        row = {
            "step": trainer.global_step,
            "rank": trainer.global_rank,
            "world": trainer.world_size,
            "samples": [[s.ref.source, s.ref.epoch, s.ref.index] for s in batch.samples],
            "tokens": batch.input_ids[batch.segment_ids >= 0].tolist(),
            "idle": [name for name, media in batch.media.items() if media.idle],
        }
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


class Hang(L.Callback):
    """A rank stands still in a step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            time.sleep(1000)


class Fails(L.Callback):
    """The last rank fails before some steps: once each, or always."""

    def __init__(self, steps: list[int], folder: str | None = None) -> None:
        self.steps, self.folder = steps, folder

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        step = trainer.global_step
        if trainer.global_rank != trainer.world_size - 1 or step not in self.steps:
            return
        if self.folder is not None:
            done = Path(self.folder) / f"failed-{step}"
            if done.exists():
                return
            done.touch()
        raise RuntimeError(f"fails before step {step}")


class SlowSteps(L.Callback):
    """Steps of a tenth of a second: there is time for something to happen."""

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(0.1)


class Pause(L.Callback):
    """Stands still for so long at the end of a step; a run that goes on from there does not."""

    def __init__(self, step: int, seconds: float) -> None:
        self.step, self.seconds = step, seconds

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == self.step:
            time.sleep(self.seconds)


class HeldShards(L.Callback):
    """The last rank's file of the first checkpoint is not written before a step has ended."""

    def __init__(self, until: int) -> None:
        self.until, self.ended = until, threading.Event()

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        write = sharded.write

        def held(*args: Any) -> str:
            assert trainer.global_rank != trainer.world_size - 1 or self.ended.wait(60)
            return write(*args)

        sharded.write = held

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.until:
            self.ended.set()


class UntilAskedToStop(L.Callback):
    """Holds the end of a step until a signal has come, so that a slow machine does not finish the
    run before; a run that goes on from there is not held.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        keeper = next(c for c in trainer.callbacks if isinstance(c, RunCheckpoint))
        deadline = time.monotonic() + 60
        while trainer.global_step == self.step and not keeper._signal:
            assert time.monotonic() < deadline, "no signal has come"
            time.sleep(0.001)


def recorded(folder: Path) -> list[dict[str, Any]]:
    """All rows, by step and rank."""
    rows = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.open()]
    return sorted(rows, key=lambda row: (row["step"], row["rank"]))


def steps(folder: Path) -> dict[int, tuple[list[Any], list[int]]]:
    """Samples and tokens of each optimizer step, ranks and micro-batches laid end to end."""
    found: dict[int, tuple[list[Any], list[int]]] = {}
    for row in recorded(folder):
        samples, tokens = found.setdefault(row["step"], ([], []))
        samples += row["samples"]
        tokens += row["tokens"]
    return found


class DropoutProjector(Projector):
    """A linear layer behind dropout, to show that dropout is resumed."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(dropout)
        self.linear = torch.nn.Linear(in_dim, out_dim)

    def forward(self, features_NFD: torch.Tensor, mask_NF: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout(features_NFD))


class NowAndThen(Projector):
    """A linear layer, and one more in every other pass: beside its weights there are none that a
    step may leave out.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear, self.more = (torch.nn.Linear(in_dim, out_dim) for _ in range(2))
        self.passes = 0

    def forward(self, features_NFD: torch.Tensor, mask_NF: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        out = self.linear(features_NFD)
        return out + self.more(features_NFD) if self.passes % 2 else out


class NotANumber(NextToken):
    """Next token, until it, or its gradient alone, is NaN."""

    def __init__(self, from_step: int, gradient_only: bool = False) -> None:
        super().__init__()
        self.from_step, self.gradient_only, self.calls = from_step, gradient_only, 0

    def forward(self, model: AnyToAnyModel, output: ModelOutput, batch: Batch) -> Loss:
        loss = super().forward(model, output, batch)
        self.calls += 1
        broken = self.calls > self.from_step
        if broken and self.gradient_only:
            return replace(loss, total=loss.total + (0 * loss.total).sqrt())
        return replace(loss, total=loss.total * float("nan")) if broken else loss


class Broken(NextToken):
    """Next token; each of some samples, as ``source/epoch/index``, adds a number to the loss (None:
    NaN), of ranks that share its pack to the first one's.
    """

    def __init__(self, samples: list[str], adds: float | None = None) -> None:
        super().__init__()
        self.samples, self.adds = set(samples), float("nan") if adds is None else adds

    def forward(self, model: AnyToAnyModel, output: ModelOutput, batch: Batch) -> Loss:
        loss = super().forward(model, output, batch)
        if model.sequence_group is not None and model.sequence_group.rank:
            return loss
        refs = [sample.ref for sample in batch.samples]
        found = sum(f"{r.source}/{r.epoch}/{r.index}" in self.samples for r in refs)
        return replace(loss, total=loss.total + found * self.adds) if found else loss


class NormProjector(Projector):
    """A linear layer behind running statistics."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(in_dim)
        self.linear = torch.nn.Linear(in_dim, out_dim)

    def forward(self, features_NFD: torch.Tensor, mask_NF: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(features_NFD.transpose(1, 2)).transpose(1, 2))


def write_shards(folder: Path, name: str, samples: int, media: str = "image", seed: int = 0) -> str:
    """Samples of 3 to 20 words; two of three have an item of one of ``media``."""
    draw = random.Random(seed)
    with ShardWriter(str(folder / f"{name}-%06d.tar"), max_samples=50) as writer:
        for i in range(samples):
            words = " ".join(f"w{draw.randrange(35)}" for _ in range(draw.randrange(3, 20)))
            record = {"txt": words.encode()}
            if media and i % 3:
                kind = draw.choice(media.split(","))
                record[kind] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 5)))
            writer.write(f"{name}{i:05d}", record)
    return str(folder / f"{name}-*.tar")


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe over tiny parts and data in ``folder``, made where they are missing.

    ``changes`` are by dotted key, with ``__`` for the dots.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "llm").exists():
        save_llm(folder / "llm")
        write_shards(folder, "train", 120)
        write_shards(folder, "words", 60, media="", seed=1)
        write_shards(folder, "val", 12, seed=2)
    converter = {"class_path": f"{HERE}.TinyConverter"}
    recipe: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "wandb": "off",
        "trainer": {
            "max_steps": 12,
            "accelerator": "cpu",
            "devices": 1,
            "gradient_clip_val": 1.0,
            "enable_progress_bar": False,
        },
        "model": {
            "encoders": {"image": {"class_path": f"{TINY}.TinyEncoder"}},
            "input_projectors": {"image": {"class_path": f"{HERE}.DropoutProjector"}},
            "llm": {
                "class_path": "mmfusion.models.llms.hf_causal_lm.HFCausalLM",
                "init_args": {"path": str(folder / "llm")},
            },
            "objectives": {
                "next_token": {"class_path": "mmfusion.objectives.next_token.NextToken"}
            },
            "tuning": {
                "input_projectors": {
                    "class_path": "mmfusion.tuning.Full",
                    "init_args": {"lr": 1e-2},
                },
                "llm": {
                    "class_path": "mmfusion.tuning.LoRA",
                    "init_args": {"r": 2, "lr": 1e-2, "dropout": 0.2},
                },
            },
            "schedule": {"warmup_steps": 2},
        },
        "data": {
            "sources": {
                "train": {
                    "shards": str(folder / "train-*.tar"),
                    "converter": converter,
                    "weight": 2,
                },
                "words": {"shards": str(folder / "words-*.tar"), "converter": converter},
            },
            "pack_tokens": 64,
            "packs_per_step": 4,
            "packs_per_micro_batch": 2,
            "lanes": 4,
            "window": 16,
            "num_workers": 0,
        },
        "checkpoint": {"every_n_steps": 4},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        target = recipe
        for part in path:
            target = target.setdefault(part, {})
        target[last] = value
    path = folder / f"recipe{len(list(folder.glob('recipe*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def fit(recipe: Path, *options: str) -> RunDirectory:
    """Run ``mmfusion fit`` in this process."""
    main(["fit", "-c", str(recipe), *options])
    config = yaml.safe_load(recipe.read_text())
    given = [option.split("=", 1)[1] for option in options if option.startswith("--run_dir=")]
    return RunDirectory(given[-1] if given else config["run_dir"])


def refused(capsys: pytest.CaptureFixture[str], recipe: Path, *options: str) -> str:
    """What is said where ``mmfusion fit`` does not start."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(recipe), *options])
    assert stop.value.code == 1
    return capsys.readouterr().err


def write_rest(folder: Path, step: int, shapes: Mapping[str, Any] | None = None) -> str:
    """``rest.ckpt`` of a checkpoint in shards that holds next to nothing; its name."""
    rest = dict.fromkeys(REQUIRED_KEYS, 0) | {"state_dict": {}, "callbacks": {}}
    torch.save({**rest, "global_step": step, "shapes": dict(shapes or {})}, folder / REST)
    return REST


def losses(run: RunDirectory, attempt: int | None = None) -> dict[int, str]:
    """``train/loss`` of each step as written; later attempts replace earlier ones. The file may be
    read while a row is half written.
    """
    found = {}
    with (run.path / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row.get("train/loss") and (
                attempt is None or float(row["trainer/attempt"]) == attempt
            ):
                found[int(float(row["trainer/global_step"]))] = row["train/loss"]
    return found
