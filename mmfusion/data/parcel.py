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
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            raw = obj.detach().contiguous().flatten().view(torch.uint8).numpy()
            return _rebuild, (pickle.PickleBuffer(raw.data), obj.dtype, tuple(obj.shape))
        return NotImplemented


def pack(value: Any) -> Parcel:
    """Copy every tensor in ``value`` into one block."""
    buffers: list[pickle.PickleBuffer] = []
    header = io.BytesIO()
    _Pickler(header, protocol=5, buffer_callback=buffers.append).dump(value)
    spans, end = [], 0
    for buffer in buffers:
        first = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = first + buffer.raw().nbytes
        spans.append((first, end))
    block = torch.empty(end, dtype=torch.uint8)
    memory = block.numpy().data
    for (first, last), buffer in zip(spans, buffers, strict=True):
        memory[first:last] = buffer.raw()
    return Parcel(header.getvalue(), spans, block)


def unpack(parcel: Parcel) -> Any:
    """The object again; its tensors are views of the block."""
    memory = parcel.block.numpy().data
    return pickle.loads(  # noqa: S301 (from our own loader process)
        parcel.header, buffers=[memory[first:end] for first, end in parcel.spans]
    )


def _rebuild(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)
