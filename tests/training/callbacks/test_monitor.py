"""What the monitor logs in a real run, against sums made by hand from every micro-batch."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from mmfusion.data.writer import ShardWriter
from mmfusion.training.callbacks.monitor import gradient_norms
from mmfusion.training.loggers import read_metrics
from tests.training.tiny import fit, write_recipe

DROPOUT_OFF = {"class_path": "tests.training.tiny.DropoutProjector", "init_args": {"dropout": 0.0}}
EVERY = 3


class Recorder(L.Callback):
    """Keeps what the monitor sums up, by log window."""

    windows: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        Recorder.windows = [defaultdict(float)]

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        for group in optimizer.param_groups:
            for p in group["params"]:
                squares[group["name"]] += p.grad.pow(2).sum()
            self.windows[-1]["lr " + group["name"]] = group["lr"]
        for name, square in squares.items():
            self.windows[-1]["norm " + name] = float(square.sqrt())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = self.windows[-1]
        loss = outputs["losses"]["next_token"]
        for i, sample in enumerate(batch.samples):
            now["sum " + sample.ref.source] += float(loss.per_sample[i])
            now["count " + sample.ref.source] += int(loss.per_sample_count[i])
        now["tokens"] += int((batch.segment_ids >= 0).sum())
        now["places"] += batch.input_ids.numel()
        now["samples"] += len(batch.samples)
        media = batch.media["image"]
        now["images"] += 0 if media.idle else len(media.num_tokens)
        if batch.stream is not None and trainer.global_step % EVERY == 0:
            self.windows.append(defaultdict(float))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    recipe = write_recipe(
        tmp_path_factory.mktemp("monitor"),
        trainer__max_steps=2 * EVERY,
        trainer__log_every_n_steps=EVERY,
        trainer__callbacks=[{"class_path": f"{__name__}.Recorder"}],
        data__pad_rows=True,
        data__packs_per_micro_batch=1,
    )
    return read_metrics(fit(recipe).path / "metrics.csv")


def test_losses_by_source_are_means_over_the_tokens_of_the_window(
    rows: list[dict[str, float]],
) -> None:
    logged = [row for row in rows if "train/next_token/train" in row]
    assert len(logged) == 2
    for row, window in zip(logged, Recorder.windows, strict=False):
        for source in ("train", "words"):
            expected = window[f"sum {source}"] / window[f"count {source}"]
            assert row[f"train/next_token/{source}"] == pytest.approx(expected, rel=1e-5)


def test_throughput_counts_what_was_trained(rows: list[dict[str, float]]) -> None:
    for row, window in zip(rows, Recorder.windows, strict=False):
        seconds = row["throughput/step_s"] * EVERY
        supervised = window["count train"] + window["count words"]
        for key, count in {
            "tokens": window["tokens"],
            "supervised_tokens": supervised,
            "samples": window["samples"],
            "image": window["images"],
        }.items():
            assert row[f"throughput/{key}_per_s"] * seconds == pytest.approx(count, rel=1e-5)
        padding = 1 - window["tokens"] / window["places"]
        assert row["throughput/padding_share"] == pytest.approx(padding)
        assert 0 < row["throughput/padding_share"] < 1
        assert 0 < row["throughput/wait_share"] < 1
        assert row["throughput/rss_peak_gib"] > 0.1


def test_rates_and_norms_are_those_of_the_last_step_before_clipping(
    rows: list[dict[str, float]],
) -> None:
    for row, window in zip(rows, Recorder.windows, strict=False):
        for name in ("input_projectors/Full", "llm/LoRA"):
            assert row[f"train/grad_norm/{name}"] == pytest.approx(window[f"norm {name}"], rel=1e-4)
            assert row[f"train/lr/{name}"] == window[f"lr {name}"] > 0


def test_groups_without_gradients_have_no_norm() -> None:
    with_grad, without = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    with_grad.grad = torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD(
        [
            {"params": [with_grad], "name": "a/Full"},
            {"params": [without], "name": "b/Full"},
        ],
        lr=0.1,
    )
    assert gradient_norms(optimizer) == {"a/Full": torch.tensor(5.0)}
    without.grad = torch.tensor([0.0, 12.0])
    optimizer.param_groups[1]["name"] = "a/Full/no_decay"
    assert gradient_norms(optimizer) == {"a/Full": torch.tensor(13.0)}


def test_samples_left_out_are_counted_by_reason(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "bad-%06d.tar"), max_samples=50) as writer:
        for i in range(40):
            writer.write(f"k{i}", {"image": b"" if i % 4 == 0 else b"1", "txt": b"w1 w2 w3"})
    converter = {"class_path": "tests.training.tiny.TinyConverter"}
    source = {"shards": str(tmp_path / "bad-*.tar"), "converter": converter}
    recipe = write_recipe(
        tmp_path,
        trainer__max_steps=3,
        data__sources={"bad": source},
        data__max_bad_fraction=0.9,
    )
    last = read_metrics(fit(recipe).path / "metrics.csv")[-1]
    assert last["data/bad/empty_image"] > 0
    assert last["data/bad/empty_image"] == last["data/bad/bad"]  # of the source named bad


@pytest.mark.slow
def test_two_ranks_log_the_losses_and_counts_of_one(tmp_path: Path) -> None:
    logged = []
    for ranks in (1, 2):
        recipe = write_recipe(
            tmp_path,
            run_dir=str(tmp_path / f"run{ranks}"),
            trainer__max_steps=4,
            trainer__log_every_n_steps=2,
            trainer__devices=ranks,
            trainer__strategy="ddp" if ranks > 1 else "auto",
            model__input_projectors__image=DROPOUT_OFF,
            model__tuning__llm__init_args__dropout=0.0,
            data__packs_per_micro_batch=2,
        )
        command = [sys.executable, "-m", "mmfusion", "fit", "-c", str(recipe)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        logged.append(read_metrics(tmp_path / f"run{ranks}" / "metrics.csv"))
    for one, two in zip(*logged, strict=True):
        for key in [key for key in one if key.startswith(("train/next_token", "train/grad_norm"))]:
            assert two[key] == pytest.approx(one[key], rel=1e-4), key
        for name in ("tokens", "samples", "image", "supervised_tokens"):
            counts = [
                row[f"throughput/{name}_per_s"] * row["throughput/step_s"] for row in (one, two)
            ]
            assert counts[1] == pytest.approx(counts[0], rel=1e-5)


def test_time_spent_waiting_is_told_from_time_spent_computing() -> None:
    """The share follows a loader that sleeps (the hooks alone, no model)."""
    from mmfusion.training.callbacks.monitor import Monitor

    monitor = Monitor()
    start = time.perf_counter()
    time.sleep(0.1)
    monitor.on_train_batch_start(None, None, None, 0)  # type: ignore[arg-type]
    assert 0.1 <= monitor._waited <= time.perf_counter() - start + 1e-3
