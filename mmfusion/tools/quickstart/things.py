"""What of the quickstart's data can be asked for or about: a medium with its caption."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmfusion.tools.quickstart.concepts import fraction
from mmfusion.tools.quickstart.datasets import Entry


@dataclass(frozen=True)
class Thing:
    """What can be asked for, with a medium that shows it.

    Attributes:
        split: side of the split.
        key: fit for a shard key.
        modality: of the medium.
        caption: ``A blue circle.``
        extension: of the medium's file.
        data: the file.
        about: what else the record's ``json`` says of it.
    """

    split: str
    key: str
    modality: str
    caption: str
    extension: str
    data: bytes
    about: Mapping[str, Any]

    @property
    def words(self) -> str:
        """The caption within a sentence: ``a blue circle``."""
        return self.caption[:1].lower() + self.caption[1:].rstrip(".!?")


def things_of(entries: Iterable[Entry], modality: str, extension: str) -> Iterator[Thing]:
    """Entries of one medium with its caption, as things."""
    for entry in entries:
        about = json.loads(entry.record["json"])
        caption = entry.record["txt"].decode()
        data = entry.record[extension]
        yield Thing(entry.split, entry.key, modality, caption, extension, data, about)


def turned(options: Sequence[Any], why: str) -> Sequence[Any]:
    """All of them, beginning anywhere."""
    first = int(fraction(why) * len(options))
    return [*options[first:], *options[:first]]
