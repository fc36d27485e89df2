"""A converter turns one record of a shard into a sample. A new kind of data is one such class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from mmfusion.types import Sample


class Converter(ABC):
    """Record to sample. The constructor is its configuration; it is picklable and keeps no state,
    so that the same record always gives the same sample.

    Records come from strangers: nothing in them is ever opened as a path or fetched as an address.
    """

    @abstractmethod
    def __call__(self, record: Mapping[str, bytes], shard: str, key: str) -> Sample:
        """Convert one record.

        Args:
            record: the members of the record, by extension without the leading dot (``jpg``,
                ``json``, ``0.jpg``).
            shard: path of the shard, kept for reports.
            key: the record's key in the shard, kept for reports.

        Raises:
            DataError: for a record that cannot be used.
        """
