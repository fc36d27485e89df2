"""``sequence_parallel: 4`` of a recipe: groups of ranks that share their packs, each a part of the
tokens of every pack, so that a pack may be longer than one GPU holds.

The ranks of a group are given the same micro-batches. Each runs its part of the row, with the media
and the targets that are in it, and sums the losses of its own terms; the LLM's attention is the one
place where they meet (:mod:`mmfusion.models.llms.sequence`). So gradients and losses are summed
over all ranks as without groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mmfusion.models.llms.sequence import SequenceGroup
from mmfusion.types import IGNORE_INDEX, Batch, MediaBatch, TargetBatch


def join_group(size: int, timeout: timedelta | None = None) -> SequenceGroup:
    """The group of this rank; every rank must call it. Neighbours share: they are on one node.

    Args:
        size: of each group.
        timeout: of a collective; None: torch's own, which is not that of the group of all ranks.
    """
    group, _ = dist.new_subgroups(size, timeout=timeout)
    assert group is not None
    return SequenceGroup(group)


def own_part(batch: Batch, rank: int, size: int) -> Batch:
    """What one rank of a group computes of a micro-batch that all of them have.

    Args:
        batch: in one row.
        rank: in the group.
        size: of the group.

    Returns:
        The batch with ``bounds``, with the labels of this rank's tokens, and with the media and
        targets that are there alone; where there is none of a modality, one of another rank is idle
        here. A media item across a bound is with both; a target is not cut.
    """
    bounds = part_bounds(batch.host, size)
    batch = _padded(batch, bounds[-1])
    host = batch.host
    part = _Part(
        bounds,
        rank,
        media={name: _media_in(one, bounds[rank : rank + 2]) for name, one in host.media.items()},
        targets={
            name: _targets_in(one, bounds[rank : rank + 2]) for name, one in host.targets.items()
        },
    )
    found = part.of(batch, host)
    if host is not batch:
        found._host = part.of(host, host)
    return found


def part_bounds(batch: Batch, size: int) -> tuple[int, ...]:
    """Where each part of a row begins, and the end: about as many tokens to each and at least one,
    the signal tokens of a target in one part. A row that is too short for that ends later.
    """
    length = batch.input_ids.shape[1]
    spans = [
        (first, last)
        for target in batch.targets.values()
        if not target.idle
        for first, last in target.slots[:, [0, -1]].tolist()
    ]
    bounds = [0]
    for place in range(1, size):
        bound = length * place // size
        bound = next((first for first, last in spans if first < bound <= last), bound)
        if bound <= bounds[-1]:
            bound = bounds[-1] + 1
            bound = next((last + 1 for first, last in spans if first < bound <= last), bound)
        bounds.append(bound)
    return (*bounds, max(length, bounds[-1] + 1))


def _padded(batch: Batch, length: int) -> Batch:
    """With padding at the end of its row, in a border of its own."""
    missing = length - batch.input_ids.shape[1]
    if not missing:
        return batch
    assert batch.cu_seqlens is not None
    values = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0, "segment_ids": -1}
    longer: dict[str, Any] = {
        name: F.pad(getattr(batch, name), (0, missing), value=value)
        for name, value in values.items()
    }
    longer["cu_seqlens"] = torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:] + missing])
    found = replace(batch, **longer)
    if batch.host is not batch:
        found._host = _padded(batch.host, length)
    return found


def _media_in(media: MediaBatch, part: Sequence[int]) -> Tensor:
    """(N,) bool: the items with a slot in a part."""
    inside = ((media.slots >= part[0]) & (media.slots < part[1])).long().cumsum(0)
    before, ends = (
        torch.cat([torch.zeros(1, dtype=torch.int64), inside]),
        media.num_tokens.cumsum(0),
    )
    return before[ends] > before[ends - media.num_tokens]


def _targets_in(target: TargetBatch, part: Sequence[int]) -> Tensor:
    """(M,) bool: the targets in a part."""
    return (target.slots[:, 0] >= part[0]) & (target.slots[:, 0] < part[1])


@dataclass(frozen=True)
class _Part:
    """Attributes:
    bounds: of all parts.
    rank: whose part it is.
    media: (N,) bool of each modality, on the host: the items that are in it.
    targets: (M,) bool of each modality.
    """

    bounds: tuple[int, ...]
    rank: int
    media: dict[str, Tensor]
    targets: dict[str, Tensor]

    def of(self, batch: Batch, host: Batch) -> Batch:
        """This part of ``batch``, which is ``host`` or a copy of it on a device."""
        own = slice(self.bounds[self.rank] + 1, self.bounds[self.rank + 1] + 1)
        labels = torch.full_like(batch.labels, IGNORE_INDEX)
        labels[:, own] = batch.labels[:, own]  # a label is predicted from the token before it
        return replace(
            batch,
            input_ids=self._ids(batch.input_ids, host),
            labels=labels,
            media={
                name: _items(one, host.media[name], self.media[name])
                for name, one in batch.media.items()
            },
            targets={name: _aims(one, self.targets[name]) for name, one in batch.targets.items()},
            bounds=self.bounds,
        )

    def _ids(self, input_ids: Tensor, host: Batch) -> Tensor:
        """Those of media and targets that are left out are replaced by one of the text."""
        taken = torch.zeros(host.input_ids.numel(), dtype=torch.bool)
        kept = taken.clone()
        for name, media in host.media.items():
            taken[media.slots] = True
            kept[media.slots[self.media[name].repeat_interleave(media.num_tokens)]] = True
        for name, target in host.targets.items():
            if not target.idle:
                taken[target.slots] = True
                kept[target.slots[self.targets[name]]] = True
        text = host.input_ids.flatten()[~taken][:1]
        gone = (taken & ~kept).view_as(host.input_ids).to(input_ids.device, non_blocking=True)
        return input_ids.masked_fill(gone, int(text) if len(text) else 0)


def _items(media: MediaBatch, host: MediaBatch, there_N: Tensor) -> MediaBatch:
    if host.idle or bool(there_N.all()):
        return media
    places, idle = _places(there_N)
    counts = _at(media.num_tokens, places)
    return MediaBatch(
        tensors={name: _at(tensor, places) for name, tensor in media.tensors.items()},
        num_features=_at(media.num_features, places),
        num_tokens=torch.zeros_like(counts) if idle else counts,
        slots=_at(media.slots, there_N.repeat_interleave(host.num_tokens).nonzero().squeeze(1)),
        idle=idle,
    )


def _aims(target: TargetBatch, there_M: Tensor) -> TargetBatch:
    if target.idle or bool(there_M.all()):
        return target
    places, idle = _places(there_M)
    slots = _at(target.slots, places)
    return TargetBatch(
        tensors={name: _at(tensor, places) for name, tensor in target.tensors.items()},
        slots=torch.zeros_like(slots) if idle else slots,
        segments=_at(target.segments, places),
        keys=_at(target.keys, places),
        captions=[target.captions[place] for place in places.tolist()],
        idle=idle,
    )


def _places(there: Tensor) -> tuple[Tensor, bool]:
    """Of the items that are there; where none is, the first one's, which is idle then."""
    found = there.nonzero().squeeze(1)
    return (found, False) if len(found) else (torch.tensor([0]), True)


def _at(tensor: Tensor, places: Tensor) -> Tensor:
    """By an index on the host."""
    return tensor[places.to(tensor.device, non_blocking=True)]
