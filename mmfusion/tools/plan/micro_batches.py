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
        pack_tokens: mean tokens of a pack, without padding.
        real: whether they are the recipe's own data.
    """

    batches: list[Batch]
    origin: str
    pack_tokens: float
    real: bool


def micro_batches(data: MultimodalData, processor: Processor, world: int) -> Given:
    """Those that rank 0 of ``world`` sees first.

    Raises:
        ValueError, OSError: where the data cannot be read.
    """
    data.attach(processor)
    division = data.division(0, world)
    stream = Stream(data.state, data.sources, processor)
    batches: list[Batch] = []
    step = 0
    while len(batches) < MOST:
        count = data.packs_per_step
        local = stream.local_step(step, step * count, count, 0, world)
        made = make_micro_batches(local, division, processor, data.pad_rows)
        made = [batch for batch in made if batch.samples]
        if not made:
            break
        batches += made
        step += 1
    batches = batches[:MOST]
    if not batches:
        raise ValueError("the data give no pack; see the checks of data.sources.")
    tokens = sum(int((batch.segment_ids >= 0).sum()) for batch in batches)
    packs = len(batches) * min(division.packs_per_micro_batch, -(-data.packs_per_step // world))
    origin = f"the first {len(batches)} micro-batches of the recipe's data"
    return Given(batches, origin, tokens / packs, real=True)


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
    return Given([batch], origin, data.pack_tokens, real=False)
