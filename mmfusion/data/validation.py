"""The batches of validation: every sample once over all ranks, always the same."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from torch.utils.data import Dataset

from mmfusion.data.collate import collate
from mmfusion.data.packing import Item
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
    """Samples in order, laid into packs as they come. Planned at once, decoded when asked for.

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
        planned = [self._reader.plan(ref) for ref in refs]
        self.bad = [result for result in planned if isinstance(result, BadSample)]
        if self.bad:
            reasons = Counter(f"{bad.source}: {bad.reason}" for bad in self.bad)
            logger.warning(
                "validation leaves out %d of %d samples %s, e.g.\n%s",
                len(self.bad), len(refs), dict(reasons), "\n".join(map(str, self.bad[:5])),
            )  # fmt: skip
        packs = _next_fit([result for result in planned if isinstance(result, Item)], budget)
        count = -(-len(packs) // world)
        self._packs = packs[rank::world] + [[]] * (count - len(packs[rank::world]))

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, number: int) -> Batch:
        samples = []
        for item in self._packs[number]:
            result = self._reader.finish(item)
            if isinstance(result, EncodedSample):
                samples.append(result)
            else:
                logger.warning("validation leaves out a sample:\n%s", result)
        return collate(samples, self._processor, self._pad_rows)


def _next_fit(items: list[Item], budget: Budget) -> list[list[Item]]:
    """Items in order, a new pack where the next does not fit."""
    packs: list[list[Item]] = []
    left = [0] * len(budget.total)
    for item in items:
        if not packs or any(c > free for c, free in zip(item.cost, left, strict=True)):
            packs.append([])
            left = list(budget.total)
        packs[-1].append(item)
        left = [free - c for free, c in zip(left, item.cost, strict=True)]
    return packs
