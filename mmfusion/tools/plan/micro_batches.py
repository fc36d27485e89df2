"""Micro-batches to plan with: the first of the recipe's own data where they can be read, else made
up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmfusion.data.collate import collate
from mmfusion.data.datamodule import MultimodalData
from mmfusion.data.loader import make_micro_batches
from mmfusion.data.stream import Stream
from mmfusion.processing.processor import Processor
from mmfusion.types import IGNORE_INDEX, Batch, BatchSample, SampleRef

MOST = 3
"""Micro-batches that are looked at."""


@dataclass(frozen=True)
class Given:
    """Micro-batches of rank 0.

    Attributes:
        batches: some of them.
        origin: where they are from, for the report.
        packs: mean packs of a micro-batch.
        pack_tokens: mean tokens of a pack, without padding.
        real: whether they are the recipe's own data.
    """

    batches: list[Batch]
    origin: str
    packs: float
    pack_tokens: float
    real: bool


def micro_batches(data: MultimodalData, processor: Processor, world: int) -> Given:
    """Those that rank 0 of ``world`` sees first.

    Raises:
        ValueError, OSError: where the data cannot be read.
    """
    data.attach(processor)
    division = data.division(0, world)
    stream, size = Stream(data.state, data.sources, processor), division.packs_per_micro_batch
    found: list[tuple[Batch, int]] = []
    step = 0
    while len(found) < MOST:
        count = data.packs_per_step
        local = stream.local_step(step, step * count, count, 0, world)
        made = make_micro_batches(local, division, processor, data.pad_rows)
        packs = [len(local.packs[i * size : (i + 1) * size]) for i in range(len(made))]
        pairs = [pair for pair in zip(made, packs, strict=True) if pair[0].samples]
        if not pairs:
            break
        found += pairs
        step += 1
    found = found[:MOST]
    if not found:
        raise ValueError("the data give no pack; see the checks of data.sources.")
    batches, total = [batch for batch, _ in found], sum(packs for _, packs in found)
    tokens = sum(int((batch.segment_ids >= 0).sum()) for batch in batches)
    origin = f"the first {len(batches)} of the recipe's data"
    return Given(batches, origin, total / len(batches), tokens / total, real=True)


def made_up(data: MultimodalData, processor: Processor, world: int) -> Given:
    """Full packs of text, each token a label, without media: all that is known without data."""
    packs = min(data.packs_per_micro_batch, -(-data.packs_per_step // world))
    batch = collate([], processor)
    length = packs * data.pack_tokens
    ids = torch.zeros(1, length, dtype=torch.int64)
    labels = ids.clone()
    starts = torch.arange(packs + 1, dtype=torch.int32) * data.pack_tokens
    labels[0, starts[:-1].long()] = IGNORE_INDEX
    batch.input_ids, batch.labels = ids, labels
    batch.position_ids = torch.arange(data.pack_tokens).repeat(packs)[None]
    batch.segment_ids = torch.arange(packs).repeat_interleave(data.pack_tokens)[None]
    batch.cu_seqlens = starts
    batch.samples = [BatchSample(SampleRef("made up", 0, index), "", "") for index in range(packs)]
    origin = "full packs of text alone, made up"
    return Given([batch], origin, packs, data.pack_tokens, real=False)
