"""A source of a recipe's mixture: shards, the converter that reads their records, a weight."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from mmfusion.data.converters.base import Converter
from mmfusion.data.shards import Shards
from mmfusion.types import Sample


class Source:
    """Samples of one kind.

    Args:
        shards: tars of samples: folders, globs, brace lists.
        converter: makes a record a sample.
        weight: share of the samples drawn from this source, relative to the others'; 0 leaves it
            out. Must be equal for all sources where the run is counted in epochs.
    """

    def __init__(self, shards: str | list[str], converter: Converter, weight: float = 1.0) -> None:
        self.patterns, self.converter, self.weight = shards, converter, weight

    @cached_property
    def shards(self) -> Shards:
        """The shards, opened and checked on first use."""
        return Shards(self.patterns)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> Sample:
        """Read and convert a sample; it carries its shard and key.

        Raises:
            DataError: for a record that cannot be used.
        """
        record, shard, key = self.shards.read(index)
        return replace(self.converter(record, shard, key), shard=shard, key=key)
