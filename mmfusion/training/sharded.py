"""Checkpoints in shards: each rank writes the numbers that it holds.

A tensor is flattened; a share of it is a row of its numbers from a place on. That is what ZeRO
deals out, what FSDP2's first dimension comes to, and what is dealt out here of a tensor that every
rank has whole. So a folder of shares says nothing of the strategy or the number of ranks that wrote
it. Each file is a safetensors file whose header says where its shares begin.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from errno import EIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARES = "rank-{rank:05d}.safetensors"
REST = "rest.ckpt"
"""All but the shares: counters, the stream's state, the names and shapes of what is shared."""
PLACES = "places"


@dataclass(frozen=True)
class Share:
    """A part of a tensor.

    Attributes:
        name: of the tensor.
        start: place of the first number in the flattened tensor.
        values: (n,), of any floating or integer type.
    """

    name: str
    start: int
    values: Tensor


@dataclass(frozen=True)
class Part:
    """What this rank holds of a tensor, in the place of the tensor in a checkpoint.

    Attributes:
        shape: of the whole tensor.
        start: place of the first number in the flattened tensor.
        values: flattened; what is beyond the tensor's end is padding.
    """

    shape: tuple[int, ...]
    start: int
    values: Tensor


def _share(name: str, value: Tensor | Part, rank: int, world: int) -> Share:
    """This rank's; of a tensor that every rank has whole, as much as the others'."""
    if isinstance(value, Part):
        count = max(0, min(value.values.numel(), math.prod(value.shape) - value.start))
        return Share(name, value.start, value.values.reshape(-1)[:count])
    flat = value.detach().reshape(-1)
    each = math.ceil(len(flat) / world)
    return Share(name, min(rank * each, len(flat)), flat[rank * each : (rank + 1) * each])


def write(folder: Path, rank: int, shares: Iterable[Share]) -> str:
    """A rank's file, flushed to disk; its name.

    Raises:
        OSError: naming the file, where it cannot be written (a full disk).
    """
    tensors, places = {}, {}
    for share in shares:
        if len(share.values):
            tensors[share.name] = share.values.detach().to("cpu").contiguous()
            places[share.name] = share.start
    name = SHARES.format(rank=rank)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, folder / name, metadata={PLACES: json.dumps(places)})
    except SafetensorError as error:  # of a full disk too
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else EIO, str(error), str(folder / name)) from None
    with open(folder / name, "rb+") as file:
        os.fsync(file.fileno())
    return name


class Shares:
    """What all ranks wrote.

    Args:
        folder: of the checkpoint.

    Raises:
        ValueError: where a file cannot be read as such.
    """

    def __init__(self, folder: str | Path) -> None:
        self._rows: dict[str, list[tuple[int, int, Path]]] = {}
        for path in sorted(Path(folder).glob(SHARES.replace("{rank:05d}", "*"))):
            try:
                with safe_open(path, "pt") as file:
                    places = json.loads((file.metadata() or {})[PLACES])
                    for name in file.keys():  # noqa: SIM118 (it is no dict)
                        start, (count,) = int(places[name]), file.get_slice(name).get_shape()
                        self._rows.setdefault(name, []).append((start, start + count, path))
            except (SafetensorError, LookupError, ValueError, TypeError) as error:
                raise ValueError(f"{path} holds no shares of a checkpoint: {error}") from None
        for rows in self._rows.values():
            rows.sort(key=lambda row: row[:2])

    def end(self, name: str) -> int:
        """How many numbers of a tensor there are from its first on without a gap."""
        place = 0
        for begins, ends, _ in self._rows.get(name, []):
            place = max(place, ends) if begins <= place else place
        return place

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Numbers of a tensor.

        Args:
            name: of the tensor.
            start: place of the first, in the flattened tensor.
            stop: place after the last.

        Returns:
            (stop - start,), on the CPU.

        Raises:
            ValueError: where no rank wrote some of them.
        """
        found, place = [], start
        for begins, ends, path in self._rows.get(name, []):
            if begins <= place < min(ends, stop):
                with safe_open(path, "pt") as file:
                    row = file.get_slice(name)[place - begins : min(ends, stop) - begins]
                found.append(row)
                place += len(row)
        if place < stop:
            raise ValueError(
                f"the checkpoint's shares of {name} end at {place}, expected numbers up to {stop}; "
                "it is not whole. Use another one."
            )
        return torch.cat(found) if len(found) != 1 else found[0]


def split(
    checkpoint: Mapping[str, Any], rank: int, world: int
) -> tuple[dict[str, Any], list[Share]]:
    """A checkpoint without its weights and optimizer state but for their shapes, and this rank's
    shares of these: of ``state_dict/<name>`` and ``optimizer/<place>/<key>``.
    """
    found: dict[str, Tensor | Part] = {
        f"state_dict/{name}": value for name, value in checkpoint["state_dict"].items()
    }
    (saved,) = checkpoint["optimizer_states"]
    kept: dict[Any, dict[str, Any]] = {}
    for place, one in saved["state"].items():
        for key, value in one.items():
            if isinstance(value, Part) or (isinstance(value, Tensor) and value.ndim):
                found[f"optimizer/{place}/{key}"] = value
            else:
                kept.setdefault(place, {})[key] = value
    rest = {
        **checkpoint,
        "state_dict": {},
        "optimizer_states": [{**saved, "state": kept}],
        "shapes": {name: [_dtype(value), *value.shape] for name, value in found.items()},
    }
    return rest, [_share(name, value, rank, world) for name, value in found.items()]


def _dtype(value: Tensor | Part) -> str:
    tensor = value.values if isinstance(value, Part) else value
    return str(tensor.dtype).removeprefix("torch.")


class Unread(Mapping[Any, Any]):
    """Tensors by name, each read when it is asked for, and kept by nobody.

    Args:
        shares: to read them from; None gives tensors without numbers.
        shapes: dtype and shape by name, as :func:`split` notes them.
        names: what the tensors are called in ``shapes``, by their names here.
        beside: other values by name.
    """

    def __init__(
        self,
        shares: Shares | None,
        shapes: Mapping[str, Any],
        names: dict[Any, str],
        beside: Mapping[Any, Any],
    ) -> None:
        self._shares, self._shapes, self._names, self._beside = shares, shapes, names, beside

    def __getitem__(self, name: Any) -> Any:
        if name in self._beside:
            return self._beside[name]
        kind, *shape = self._shapes[self._names[name]]
        if self._shares is None:
            return torch.empty(shape, dtype=getattr(torch, kind), device="meta")
        return self._shares.read(self._names[name], 0, math.prod(shape)).reshape(shape)

    def __contains__(self, name: Any) -> bool:
        return name in self._beside or name in self._names  # without reading it

    def __iter__(self) -> Iterator[Any]:
        return iter([*self._beside, *self._names])

    def __len__(self) -> int:
        return len(self._beside) + len(self._names)

    @property
    def shapes(self) -> Unread:
        """The same without numbers."""
        return Unread(None, self._shapes, self._names, self._beside)

    def renamed(self, names: Mapping[Any, Any]) -> Unread:
        """:func:`renamed`, but for what is beside them."""
        called = {new: self._names[there] for new, there in names.items()}
        return Unread(self._shares, self._shapes, called, {})


def renamed(tensors: Mapping[Any, Any], names: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Some of them, none of them read.

    Args:
        tensors: read or :class:`Unread`.
        names: what they are called there, by what they are to be called.
    """
    if isinstance(tensors, Unread):
        return tensors.renamed(names)
    return {new: tensors[there] for new, there in names.items()}


def shapes(tensors: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The same, those that are unread without numbers."""
    return tensors.shapes if isinstance(tensors, Unread) else tensors


def joined(folder: str | Path, rest: Mapping[str, Any], numbers: bool = True) -> dict[str, Any]:
    """The checkpoint that :func:`split` took apart, its tensors unread.

    Args:
        folder: of the checkpoint.
        rest: what :data:`REST` holds.
        numbers: False gives tensors on the meta device.
    """
    shapes, shares = rest["shapes"], Shares(folder) if numbers else None
    weights: dict[str, str] = {}
    states: dict[int, dict[str, str]] = {}
    for name in shapes:
        kind, _, key = name.partition("/")
        if kind == "state_dict":
            weights[key] = name
        else:
            place, _, key = key.partition("/")
            states.setdefault(int(place), {})[key] = name
    (saved,) = rest["optimizer_states"]
    state = {
        place: Unread(shares, shapes, states.get(place, {}), saved["state"].get(place, {}))
        for place in sorted({*states, *saved["state"]})
    }
    found = {name: value for name, value in rest.items() if name != "shapes"}
    return {
        **found,
        "state_dict": Unread(shares, shapes, weights, {}),
        "optimizer_states": [{**saved, "state": state}],
    }


def why_not_whole(folder: str | Path, rest: Mapping[str, Any]) -> str | None:
    """What of the tensors that :data:`REST` names no rank's file holds, or None: files of some
    ranks and their lines in the manifest may be gone together.
    """
    try:
        shares = Shares(folder)
        for name, (_, *shape) in rest["shapes"].items():
            if (end := shares.end(name)) < (count := math.prod(shape)):
                return f"has {end:,} of the {count:,} numbers of {name}; a rank's file is missing"
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return f"cannot be put together ({type(error).__name__}: {error})"
    return None


def read(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same with all of its tensors."""
    (saved,) = checkpoint["optimizer_states"]
    state = {place: dict(one) for place, one in saved["state"].items()}
    return {
        **checkpoint,
        "state_dict": dict(checkpoint["state_dict"]),
        "optimizer_states": [{**saved, "state": state}],
    }
