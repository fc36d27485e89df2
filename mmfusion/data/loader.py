"""Loaders: the stream cut into micro-batches for training, and the fixed batches of validation.

Both are plain iterables around a torch DataLoader whose workers each make whole steps (whole
batches in validation), so that the result is the same for any number of workers, and Lightning has
no DataLoader of ours to wrap in a sampler of its own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from mmfusion.data.collate import collate, distinct
from mmfusion.data.parcel import Parcel, pack, unpack
from mmfusion.data.source import Source
from mmfusion.data.state import StreamState
from mmfusion.data.stream import LocalStep, Stream, exhausted, make_order
from mmfusion.data.validation import ValidationBatches
from mmfusion.data.workers import Workers, leave_signals, signals_held
from mmfusion.processing.processor import Processor
from mmfusion.types import Batch, Captions, EncodedSample


@dataclass(frozen=True)
class Division:
    """How a step is divided: G packs over ``world`` ranks, cut into micro-batches."""

    packs_per_step: int
    packs_per_micro_batch: int
    rank: int = 0
    world: int = 1

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank in a step; equal on all ranks."""
        packs = -(-self.packs_per_step // self.world)
        return -(-packs // self.packs_per_micro_batch)


def make_micro_batches(
    step: LocalStep, division: Division, processor: Processor, pad_rows: bool
) -> list[Batch]:
    """Collate a rank's packs of a step; the last micro-batch carries what to commit."""
    size = division.packs_per_micro_batch
    groups: list[list[EncodedSample]] = []
    for i in range(division.micro_batches):
        groups.append([x for pack in step.packs[i * size : (i + 1) * size] for x in pack])
    batches = [collate(samples, processor, pad_rows) for samples in groups]
    counts = {
        unit: torch.stack([batch.step_counts[unit] for batch in batches]).sum()
        for unit in batches[0].step_counts
    }
    captions = {
        modality: _joined([batch.step_captions[modality] for batch in batches])
        for modality in batches[0].step_captions
    }
    batches = [
        replace(
            batch,
            step_counts={unit: count.clone() for unit, count in counts.items()},
            step_captions={} if i else captions,
        )
        for i, batch in enumerate(batches)
    ]
    batches[-1].stream = step.record
    return batches


def _joined(given: list[Captions]) -> Captions:
    """The distinct captions of several micro-batches."""
    given = [one for one in given if one.captions]
    names = given[0].tensors if given else ()
    return distinct(
        Captions(
            [caption for one in given for caption in one.captions],
            {name: torch.cat([one.tensors[name] for one in given]) for name in names},
        )
    )


class _Steps(IterableDataset):
    """Steps from a state on, as parcels of micro-batches; worker w of W makes every W-th."""

    def __init__(
        self,
        state: StreamState,
        sources: Mapping[str, Source],
        processor: Processor,
        division: Division,
        pad_rows: bool,
    ) -> None:
        self._state, self._sources, self._processor = state, dict(sources), processor
        self._division, self._pad_rows = division, pad_rows

    def __iter__(self) -> Iterator[Parcel | list[Batch]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        stream = Stream(self._state, self._sources, self._processor)
        d = self._division
        for ahead in itertools.count(worker, workers):
            step = self._state.step + ahead
            first = self._state.first_pack(step, d.packs_per_step)
            local = stream.local_step(step, first, d.packs_per_step, d.rank, d.world)
            batches = make_micro_batches(local, d, self._processor, self._pad_rows)
            yield pack(batches) if info else batches


class TrainLoader:
    """Micro-batches of one rank, from the committed state on.

    Every ``iter`` starts at the state as it is then, so that what was prefetched but not trained on
    comes again. On one rank a finite stream ends by itself; on several, ranks do not know of one
    another's lanes, so they go on with empty batches until the state callback stops them together.

    Args:
        state: shared with whoever commits steps.
        sources, processor: of the stream.
        division, workers: see there.
        pad_rows: one padded row a sample.
    """

    def __init__(
        self,
        state: StreamState,
        sources: Mapping[str, Source],
        processor: Processor,
        division: Division,
        workers: Workers,
        pad_rows: bool = False,
    ) -> None:
        self._state, self._sources, self._processor = state, sources, processor
        self._division, self._workers, self._pad_rows = division, workers, pad_rows

    def __iter__(self) -> Iterator[Batch]:
        state = copy.deepcopy(self._state)
        order = make_order(state.spec)
        lengths = [order.length(lane) for lane in range(state.spec.lanes)]
        if all(exhausted(lengths, state)):
            return
        dataset = _Steps(
            copy.deepcopy(state), self._sources, self._processor, self._division, self._pad_rows
        )
        for made in _start(_data_loader(dataset, self._workers, persistent=False)):
            batches = unpack(made) if isinstance(made, Parcel) else made
            yield from batches
            state.commit(batches[-1].stream)
            if self._division.world == 1 and all(exhausted(lengths, state)):
                return


class FixedLoader:
    """A fixed list of batches, made anew in every pass."""

    def __init__(self, batches: ValidationBatches, workers: Workers) -> None:
        self._loader = _data_loader(batches, workers, persistent=True)
        self._length = len(batches)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return _start(self._loader)


def _start(loader: DataLoader) -> Iterator[Any]:
    with signals_held():
        return iter(loader)


def _data_loader(dataset: Dataset, workers: Workers, persistent: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers.count,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=persistent and workers.count > 0,
        multiprocessing_context=workers.start_method if workers.count else None,
        worker_init_fn=leave_signals(workers.start_method) if workers.count else None,
    )
