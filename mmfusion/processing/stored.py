"""What frozen parts made of a media item, as a safetensors file in its record: written once by
``mmfusion data encode``, read here in place of running the parts.

A file holds the item's tensors, without a batch dimension, and about them, as the format's
metadata: ``num_features`` as its header promised; ``error`` and ``message`` where it could not be
encoded, so that it is left out as the item itself would be; ``instead_of``, the member that it took
the place of. Files come from strangers: they are compared with what the whole set is said to hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.nn.utils.rnn import pad_sequence

from mmfusion.processing.base import MediaProcessor
from mmfusion.types import DataError, Media, MediaTensors

FEATURES = "features"
"""Name of an encoder's features (F, D)."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
}
"""By their names in safetensors."""
MAX_HEADER = 1 << 16
"""Bytes; a file holds a few tensors."""

Spec = tuple[str, tuple[int | None, ...]]
"""Type and shape of a tensor; None for a length that differs between items."""
ABOUT = "about"
"""The one key of the metadata; its value is JSON."""
_REASON = re.compile(r"[a-z][a-z0-9_]{0,39}")
_COUNT = re.compile(r"\d{1,6}")
"""Features of an item: a sample is planned for as many tokens, whatever its file holds."""


def item_file(tensors: MediaTensors, about: Mapping[str, str]) -> bytes:
    """The file of an item; the same bytes for the same item."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors writes several keys in an order that changes from process to process.
    return save(own, metadata={ABOUT: json.dumps(about, sort_keys=True)} if about else None)


def read_header(data: bytes) -> tuple[dict[str, Spec], dict[str, str]]:
    """Types and shapes of an item's tensors, and what is said about it.

    Raises:
        DataError: ``missing_features``, ``corrupt_features``.
    """
    if not data:
        raise DataError(
            "missing_features",
            "the record has no stored features for the item; expected one file for each. Make "
            "them again with `mmfusion data encode`.",
        )
    length = int.from_bytes(data[:8], "little")
    try:
        if not 2 <= length <= min(MAX_HEADER, len(data) - 8):
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(data[8 : 8 + length])
        about = dict(json.loads(header.pop("__metadata__", {}).get(ABOUT, "{}")))
        specs: dict[str, Spec] = {
            str(name): (str(spec["dtype"]), tuple(map(int, spec["shape"])))
            for name, spec in header.items()
        }
    except (
        ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError
    ) as error:  # fmt: skip
        raise _corrupt(error) from error
    return specs, {str(name): str(value) for name, value in about.items()}


def read_item(data: bytes, specs: Mapping[str, Spec]) -> MediaTensors:
    """The wanted tensors of an item.

    Args:
        data: its file.
        specs: of the tensors; others that are there are passed over.

    Raises:
        DataError: ``missing_features``, ``corrupt_features``, ``bad_features`` (of another shape or
            type, or not finite), or what the item itself gave when it was encoded.
    """
    found, about = read_header(data)
    _raise_stored(about)
    if not all(_fits(found.get(name), spec) for name, spec in specs.items()):
        shown = {name: found[name] for name in sorted(found)[:8]}
        raise DataError(
            "bad_features",
            f"stored tensors are {shown}, expected {dict(specs)} (None: any length). Make them "
            "again with `mmfusion data encode`.",
        )
    try:
        tensors = {name: tensor for name, tensor in load(data).items() if name in specs}
    except SafetensorError as error:
        raise _corrupt(error) from error
    if odd := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise DataError("bad_features", f"stored {odd} are not finite; expected numbers.")
    return tensors


def _fits(found: Spec | None, wanted: Spec) -> bool:
    if found is None or found[0] != wanted[0] or len(found[1]) != len(wanted[1]):
        return False
    return all(b in (None, a) for a, b in zip(found[1], wanted[1], strict=True))


class StoredProcessor(MediaProcessor):
    """Takes the tensors that come with an item.

    Args:
        like: of the medium itself; it plans media without stored tensors.
        specs: the tensors of each item.
        identity: of what made them; part of the fingerprint that a resumed run compares.
        decodes: give what ``like`` makes of the medium as well, for parts that are not stored.
    """

    def __init__(
        self, like: MediaProcessor, specs: Mapping[str, Spec], identity: str, decodes: bool = False
    ) -> None:
        self.modality = like.modality
        self.like, self.specs, self.identity = like, dict(specs), identity
        self.decodes = decodes

    def num_features(self, media: Media) -> int:
        """From the stored shapes; of a medium from elsewhere, from its own header."""
        if media.stored is None:
            return self.like.num_features(media)
        about = read_header(media.stored)[1]
        count = about.get("num_features")
        if count is None:
            _raise_stored(about)
        if count is None or not _COUNT.fullmatch(count):
            raise _corrupt(ValueError(f"num_features is {str(count)[:20]!r}"))
        return int(count)

    def __call__(self, media: Media, rng: np.random.Generator | None = None) -> MediaTensors:
        tensors = read_item(media.stored or b"", self.specs)
        if FEATURES in tensors:
            tensors["num_features"] = torch.tensor(len(tensors[FEATURES]))
        return {**self.like(media, rng), **tensors} if self.decodes else tensors

    def idle(self) -> MediaTensors:
        tensors = {
            name: torch.zeros([size or 1 for size in shape], dtype=DTYPES[dtype])
            for name, (dtype, shape) in self.specs.items()
        }
        if FEATURES in tensors:
            tensors["num_features"] = torch.tensor(1)
        return {**self.like.idle(), **tensors} if self.decodes else tensors

    def collate(self, items: Sequence[MediaTensors]) -> MediaTensors:
        """Pad what differs in length with zeros."""
        stored = [name for name in items[0] if name in self.specs or not self.decodes]
        rest = [{n: t for n, t in item.items() if n not in stored} for item in items]
        joined = {
            name: pad_sequence([item[name] for item in items], batch_first=True)
            if None in self.specs.get(name, ("", ()))[1]
            else torch.stack([item[name] for item in items])
            for name in stored
        }
        return {**self.like.collate(rest), **joined} if self.decodes else joined


def _raise_stored(about: Mapping[str, Any]) -> None:
    """The error that the item itself gave, where it did."""
    if "error" not in about:
        return
    reason, message = about["error"], about.get("message", "")
    if not _REASON.fullmatch(reason):
        raise _corrupt(ValueError(f"its reason is {reason[:40]!r}"))
    raise DataError(reason, "".join(c if c.isprintable() else " " for c in message[:1000]))


def _corrupt(error: Exception) -> DataError:
    return DataError(
        "corrupt_features",
        f"stored features cannot be read: {error}; expected a safetensors file. Make them again "
        "with `mmfusion data encode`.",
    )
