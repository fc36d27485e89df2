"""One message a step from a loader process: all its tensors in one block of shared memory.

Sent one by one, every tensor costs an open file, and a step of many micro-batches runs into the
limit of the process. Pickle is used between our own processes only, never on data.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64


@dataclass
class Parcel:
    """Any object with tensors inside.

    Attributes:
        header: the object without its tensors' bytes.
        spans: (first, end) of each tensor in ``block``.
        block: (bytes,) uint8.
    """

    header: bytes
    spans: list[tuple[int, int]]
    block: Tensor

    def pin_memory(self) -> Parcel:
        """The same in page-locked memory."""
        return Parcel(self.header, self.spans, self.block.pin_memory())


class _Pickler(pickle.Pickler):
    """Lays tensors aside, and leaves a number, their type and their shape."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj.detach().contiguous())
        return len(self.tensors) - 1, obj.dtype, tuple(obj.shape)


class _Unpickler(pickle.Unpickler):
    """Puts views of the block in their places."""

    def __init__(self, parcel: Parcel) -> None:
        super().__init__(io.BytesIO(parcel.header))
        self._parcel = parcel

    def persistent_load(self, pid: Any) -> Tensor:
        number, dtype, shape = pid
        first, end = self._parcel.spans[number]
        return self._parcel.block[first:end].view(dtype).view(shape)


def pack(value: Any) -> Parcel:
    """Copy every tensor in ``value`` into one block."""
    header = io.BytesIO()
    pickler = _Pickler(header)
    pickler.dump(value)
    spans, end = [], 0
    for tensor in pickler.tensors:
        first = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = first + tensor.nbytes
        spans.append((first, end))
    block = torch.empty(end, dtype=torch.uint8)
    for (first, last), tensor in zip(spans, pickler.tensors, strict=True):
        block[first:last] = tensor.flatten().view(torch.uint8)
    return Parcel(header.getvalue(), spans, block)


def unpack(parcel: Parcel) -> Any:
    """The object again; its tensors are torch's own views of the block: where a copy to a device is
    still under way when they are dropped, torch keeps pinned memory until it is done.
    """
    return _Unpickler(parcel).load()
