"""The batches of validation: every sample once over all ranks, always the same."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch.utils.data import Dataset

from mmfusion.data.collate import collate
from mmfusion.data.packing import Cost, Item
from mmfusion.data.reader import Budget, Reader
from mmfusion.data.source import Source
from mmfusion.data.state import BadSample
from mmfusion.processing.processor import Processor
from mmfusion.types import Batch, EncodedSample, SampleRef

logger = logging.getLogger(__name__)


def spread(n: int, limit: int | None) -> list[int]:
    """At most ``limit`` of range(n), evenly spaced."""
    count = n if limit is None else min(n, limit)
    return [i * n // count for i in range(count)]


class ValidationBatches(Dataset[Batch]):
    """Samples in order, laid into packs as they come. Their sizes are found at once, each rank's
    share by itself; they are read when asked for.

    Args:
        sources: by name.
        processor: encodes samples.
        limit: samples of each source, evenly spread; None takes all.
        budget: of a batch.
        rank, world: this rank takes every ``world``-th batch. Ranks that would get one less end
            with an empty one, so that all have the same number.
        pad_rows: one padded row a sample.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        processor: Processor,
        limit: int | None,
        budget: Budget,
        rank: int = 0,
        world: int = 1,
        pad_rows: bool = False,
    ) -> None:
        self._processor, self._pad_rows = processor, pad_rows
        self._reader = Reader(sources, processor, 0, budget)
        refs = [
            SampleRef(name, 0, index)
            for name, source in sources.items()
            for index in spread(len(source), limit)
        ]
        costs = self._costs(refs, rank, world)
        self.bad = [cost for cost in costs if isinstance(cost, BadSample)]
        if self.bad and rank == 0:
            reasons = Counter(f"{bad.source}: {bad.reason}" for bad in self.bad)
            logger.warning(
                "validation leaves out %d of %d samples %s, e.g.\n%s",
                len(self.bad), len(refs), dict(reasons), "\n".join(map(str, self.bad[:5])),
            )  # fmt: skip
        good = {ref: c for ref, c in zip(refs, costs, strict=True) if not isinstance(c, BadSample)}
        packs = _next_fit(good, budget)
        count = -(-len(packs) // world)
        self._packs = packs[rank::world] + [[]] * (count - len(packs[rank::world]))

    def _costs(self, refs: Sequence[SampleRef], rank: int, world: int) -> list[Cost | BadSample]:
        """What each sample takes of a pack."""
        if not (dist.is_available() and dist.is_initialized()) or world == 1:
            return [self._cost(ref) for ref in refs]
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, [self._cost(ref) for ref in refs[rank::world]])
        shares = shares[:: len(shares) // world]  # neighbours may have the same
        return [shares[i % world][i // world] for i in range(len(refs))]

    def _cost(self, ref: SampleRef) -> Cost | BadSample:
        result = self._reader.plan(ref)
        return result.cost if isinstance(result, Item) else result

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, number: int) -> Batch:
        samples = []
        for ref in self._packs[number]:
            planned = self._reader.plan(ref)
            result = self._reader.finish(planned) if isinstance(planned, Item) else planned
            if isinstance(result, EncodedSample):
                samples.append(result)
            else:
                logger.warning("validation leaves out a sample:\n%s", result)
        return collate(samples, self._processor, self._pad_rows)


def _next_fit(costs: Mapping[SampleRef, Cost], budget: Budget) -> list[list[SampleRef]]:
    """Samples in order, a new pack where the next does not fit."""
    packs: list[list[SampleRef]] = []
    left = [0] * len(budget.total)
    for ref, cost in costs.items():
        if not packs or any(c > free for c, free in zip(cost, left, strict=True)):
            packs.append([])
            left = list(budget.total)
        packs[-1].append(ref)
        left = [free - c for free, c in zip(left, cost, strict=True)]
    return packs
