"""What training is doing, every ``log_every_n_steps`` optimizer steps: ``train/``, ``throughput/``.

Between log steps it only adds small tensors on the device, so nothing waits for the accelerator; on
a log step one sum over the ranks covers everything. The module itself logs ``train/loss`` and
``train/<objective>`` of the step; here, over all steps since the last log:

- ``train/<objective>/<source>``: loss per supervised token of each source,
- ``train/lr/<part>`` of each part and policy; before clipping, ``train/grad_norm`` of all gradients
  and, but under ZeRO, ``train/grad_norm/<part>``,
- ``throughput/``: ``tokens_per_s`` and ``supervised_tokens_per_s`` (padding not counted),
  ``samples_per_s``, ``<modality>_per_s``, ``padding_share``, ``wait_share`` (time between steps:
  waiting for data, writing logs and checkpoints), ``step_s``, ``rss_peak_gib``, ``cuda_peak_gib``,
- ``data/bad/<reason>``: samples left out since the run began. What was seen of each source
  (``data/<source>/``) is logged by
  :class:`mmfusion.training.callbacks.stream_state.StreamStateCallback`.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from mmfusion.data.datamodule import data_of
from mmfusion.objectives.base import Loss
from mmfusion.training.gradients import total_norm
from mmfusion.types import Batch


class Monitor(L.Callback):
    """Logs losses by source, rates, gradient norms, throughput and memory."""

    def __init__(self) -> None:
        self._sources: list[str] = []
        self._norms: dict[str, Tensor] = {}
        self._rates: dict[str, float] = {}
        self._restart_window()

    def _restart_window(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._steps = 0
        self._waited = 0.0
        self._since = self._idle_since = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sources = list(data_of(trainer).sources)
        self._restart_window()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is neither training time nor waiting."""
        self._idle_since = time.perf_counter()
        self._since += self._idle_since - self._paused

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - self._idle_since

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Rates of this step, and norms of its gradients: unscaled by now, not yet clipped."""
        if (trainer.global_step + 1) % _every(trainer) == 0:
            self._norms = gradient_norms(optimizer)
            self._rates = {name: groups[0]["lr"] for name, groups in _parts(optimizer).items()}

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._add(outputs["losses"], batch)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._steps += 1
            if trainer.global_step % _every(trainer) == 0:
                report = self._report(trainer, pl_module)
                for logger in trainer.loggers:  # some ms less than Lightning's own log
                    logger.log_metrics(report, step=trainer.global_step - 1)
                self._restart_window()
        self._idle_since = time.perf_counter()

    def _add(self, losses: dict[str, Loss], batch: Batch) -> None:
        """Count a micro-batch. No value is read off the device."""
        device = batch.input_ids.device
        index = torch.tensor(
            [self._sources.index(sample.ref.source) for sample in batch.samples], dtype=torch.int64
        ).to(device, non_blocking=True)
        for name, loss in losses.items():
            pair = torch.stack([loss.per_sample.float(), loss.per_sample_count.float()])
            sums = torch.zeros(2, len(self._sources), device=device)
            self._accumulate(name, sums.index_add(1, index, pair))
            supervised = loss.per_sample_count.sum()
        self._accumulate("supervised", supervised)
        self._accumulate("tokens", (batch.segment_ids >= 0).sum())
        self._counts["places"] += batch.input_ids.numel()
        self._counts["samples"] += len(batch.samples)
        for modality, media in batch.media.items():
            self._counts[modality] += 0 if media.idle else len(media.num_tokens)

    def _accumulate(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _report(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, float]:
        modalities = list(cast(Any, module).model.encoders)
        values = {
            **{name: value.cpu().double().flatten() for name, value in self._sums.items()},
            **{name: _scalar(self._counts[name]) for name in ("places", "samples", *modalities)},
            "waited": _scalar(self._waited),
        }
        total = dict(zip(values, _summed(trainer, list(values.values())), strict=True))
        for name in ("tokens", "places", "samples", *modalities):  # the same on ranks that share
            total[name] /= data_of(trainer).ranks_per_pack
        for name in ("supervised", *cast(Any, module).objectives):
            total[name] /= cast(Any, module).copies
        elapsed = time.perf_counter() - self._since  # after reading the sums: the device is done
        logged: dict[str, float] = {}
        for name in cast(Any, module).objectives:
            sums, counts = total[name].view(2, -1).tolist()
            for source, loss, count in zip(self._sources, sums, counts, strict=True):
                if count:
                    logged[f"train/{name}/{source}"] = loss / count
        for name in ("tokens", "samples", *modalities):
            logged[f"throughput/{name}_per_s"] = float(total[name]) / elapsed
        logged["throughput/supervised_tokens_per_s"] = float(total["supervised"]) / elapsed
        logged["throughput/padding_share"] = 1 - float(total["tokens"]) / float(total["places"])
        logged["throughput/wait_share"] = float(total["waited"]) / trainer.world_size / elapsed
        logged["throughput/step_s"] = elapsed / self._steps
        logged |= {f"train/lr/{name}": rate for name, rate in self._rates.items()}
        norms = {name: float(norm) for name, norm in self._norms.items()}
        logged |= {f"train/grad_norm/{name}": norm for name, norm in norms.items()}
        # ZeRO divides gradients among the ranks as they come, and says the norm of all.
        logged["train/grad_norm"] = getattr(
            trainer.strategy, "grad_norm", math.hypot(*norms.values())
        )
        return {**logged, **_memory(), **_bad(trainer)}


def gradient_norms(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The 2-norm of each part's gradients, () on the device; whole also where gradients are
    sharded. A part without gradients is left out (ZeRO keeps its own).
    """
    norms = {}
    for name, groups in _parts(optimizer).items():
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if gradients:
            norms[name] = total_norm(gradients)
    return norms


def _parts(optimizer: torch.optim.Optimizer) -> dict[str, list[dict[str, Any]]]:
    """Parameter groups by part and policy; the one without weight decay goes with its other."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for index, group in enumerate(optimizer.param_groups):
        name = str(group.get("name", index)).removesuffix("/no_decay")
        parts.setdefault(name, []).append(group)
    return parts


def _every(trainer: L.Trainer) -> int:
    return max(int(getattr(trainer, "log_every_n_steps", 0)), 1)


def _scalar(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _summed(trainer: L.Trainer, values: list[Tensor]) -> list[Tensor]:
    """Sums over the ranks, in one call; on the host."""
    flat = torch.cat(values)
    if trainer.world_size > 1:
        flat = flat.to(trainer.strategy.root_device)
        flat = cast(Tensor, trainer.strategy.reduce(flat, reduce_op="sum")).cpu()
    return list(flat.split([len(value) for value in values]))


def _memory() -> dict[str, float]:
    """Peaks of this process (rank 0's is logged), GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {"throughput/rss_peak_gib": peak / 2**30}
    if torch.cuda.is_available():
        found["throughput/cuda_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return found


def _bad(trainer: L.Trainer) -> dict[str, float]:
    """Samples left out so far by reason; the other ranks' up to the last checkpoint."""
    total: Counter[str] = Counter()
    for counts in data_of(trainer).state.counts.values():
        total.update(counts.bad)
    return {f"data/bad/{reason}": float(count) for reason, count in total.items()}
