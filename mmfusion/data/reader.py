"""Reads, plans and decodes one sample, and sorts what can go wrong into two kinds.

A DataError means the sample itself is unusable: it becomes a :class:`BadSample`, to be counted. Any
other error stops the run, with the sample's name on it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import TracebackType

import numpy as np

from mmfusion.data.order import key64
from mmfusion.data.packing import Cost, Item
from mmfusion.data.source import Source
from mmfusion.data.state import BadSample
from mmfusion.processing.processor import Processor
from mmfusion.types import DataError, EncodedSample, Media, PlannedSample, Sample, SampleRef

KEPT_BYTES = 64 * 2**20
"""Bytes of planned samples a reader keeps until they are decoded; the others are read again."""


class SampleError(RuntimeError):
    """An I/O or code error on a sample: it stops the run and names the sample."""


class SampleInputError(SampleError, ValueError):
    """A sample that fails by what the user gave: a file, a recipe, a converter's data."""


class naming:  # noqa: N801 (reads as a statement: `with naming(...)`)
    """Lets DataErrors pass and puts the sample's name on every other error.

    Args:
        ref: the sample.
        doing: what is being done with it.
        sources: to look up shard and key.
    """

    def __init__(self, ref: SampleRef, doing: str, sources: dict[str, Source]) -> None:
        self._ref, self._doing, self._sources = ref, doing, sources

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, DataError):
            return
        ref = self._ref
        shard, number = self._sources[ref.source].shards.locate(ref.index)
        named = SampleInputError if isinstance(error, ValueError | OSError) else SampleError
        raise named(
            f"{self._doing} sample {ref.index} of source {ref.source!r} (epoch {ref.epoch}, "
            f"sample {number} of {shard}) failed with {type(error).__name__}: {error}"
        ) from error


def sample_rng(seed: int, ref: SampleRef) -> np.random.Generator:
    """The random numbers of one sample in one epoch: the same on any rank, worker and restart."""
    key = key64("sample", seed, ref.source, ref.epoch, ref.index)
    return np.random.Generator(np.random.Philox(key=key))


class Budget:
    """What a pack may hold.

    Args:
        tokens: of a pack.
        media: encoder features of a pack, for the modalities that are limited.
    """

    def __init__(self, tokens: int, media: Mapping[str, int]) -> None:
        self.tokens, self.media = tokens, dict(sorted(media.items()))

    @property
    def total(self) -> Cost:
        """The budget as the cost of a full pack."""
        return (self.tokens, *self.media.values())

    def cost(self, planned: PlannedSample) -> Cost:
        tokens = len(planned)
        if tokens == 0:
            raise DataError("empty", "the sample has no tokens; expected some text or media.")
        if tokens > self.tokens:
            raise DataError(
                "too_long",
                f"the sample has {tokens} tokens, a pack holds {self.tokens}; "
                "shorten it or raise data.pack_tokens.",
            )
        features = dict.fromkeys(self.media, 0)
        for slots in planned.media:
            if slots.modality in features:
                features[slots.modality] += slots.num_features
        for modality, budget in self.media.items():
            if features[modality] > budget:
                raise DataError(
                    "too_much_media",
                    f"the sample has {features[modality]} {modality} features, a pack holds "
                    f"{budget}; use fewer or smaller items or raise data.pack_media.",
                )
        return (tokens, *features.values())


class Reader:
    """Plans and decodes the samples of some sources.

    Args:
        sources: by name.
        processor: encodes them.
        seed: keys the random numbers of each sample.
        budget: a sample above it is bad.
    """

    def __init__(
        self, sources: Mapping[str, Source], processor: Processor, seed: int, budget: Budget
    ) -> None:
        self._sources, self._processor = dict(sources), processor
        self._seed, self.budget = seed, budget
        self._room = KEPT_BYTES

    def plan(self, ref: SampleRef) -> Item | BadSample:
        with naming(ref, "planning", self._sources):
            try:
                sample = self._sources[ref.source][ref.index]
                planned = self._processor.plan(sample)
                return self._item(ref, planned, sample)
            except DataError as error:
                return self._bad(ref, error)

    def _item(self, ref: SampleRef, planned: PlannedSample, sample: Sample) -> Item:
        """Keeps the sample with its plan, while there is room, for as long as the item lives."""
        cost = self.budget.cost(planned)
        size = _size(sample)
        if size > self._room:
            return Item(ref, planned, cost)
        item = Item(ref, planned, cost, sample)
        self._make_room(-size)
        weakref.finalize(item, self._make_room, size).atexit = False
        return item

    def _make_room(self, size: int) -> None:
        self._room += size

    def finish(self, item: Item) -> EncodedSample | BadSample:
        ref = item.ref
        with naming(ref, "decoding", self._sources):
            try:
                sample = item.sample or self._sources[ref.source][ref.index]
                rng = sample_rng(self._seed, ref)
                return self._processor.finish(sample, item.planned, rng, ref)
            except DataError as error:
                return self._bad(ref, error)

    def _bad(self, ref: SampleRef, error: DataError) -> BadSample:
        shard, key = self._sources[ref.source].shards.where(ref.index)
        return BadSample(ref.source, ref.epoch, ref.index, shard, key, error.reason, str(error))


def _size(sample: Sample) -> int:
    """Bytes of the media, with what is stored of them, and letters of the text."""
    parts = [part for message in sample.messages for part in message.content]
    return sum(
        len(part.data) + len(part.stored or b"") if isinstance(part, Media) else len(part.text)
        for part in parts
    )
