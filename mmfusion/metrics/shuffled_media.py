"""What the right media are worth: a batch in which every sample sees the media of another one.

The shuffle is strict: the media come from a sample of the same source with another answer, take the
same number of slots, and nothing else in the batch changes. It is deterministic. Legend: S samples,
N media items of the modality.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmfusion.types import IGNORE_INDEX, Batch


def shuffle_media(batch: Batch, modality: str) -> tuple[Batch, Tensor]:
    """Give every sample the media of another sample.

    Args:
        batch: of any layout.
        modality: whose items are exchanged.

    Returns:
        The batch with the items of ``modality`` exchanged, and (S,) bool: the samples all of whose
        items of the modality are now another sample's. The others (no such media, or no partner in
        the batch) must not be counted.
    """
    media = batch.media[modality]
    shuffled = torch.zeros(len(batch.samples), dtype=torch.bool)
    if media.idle or not len(media.slots):
        return batch, shuffled
    owners = _owners(batch, modality)
    answers = _answers(batch)
    groups: dict[Hashable, list[int]] = defaultdict(list)
    counts = zip(media.num_tokens.tolist(), media.num_features.tolist(), strict=True)
    for item, (owner, count) in enumerate(zip(owners, counts, strict=True)):
        groups[(batch.samples[owner].ref.source, *count)].append(item)
    order = list(range(len(owners)))
    for items in groups.values():
        partners = roll_past_equals([answers[owners[i]] for i in items])
        for item, other in zip(items, partners, strict=True):
            order[item] = items[other]
    shuffled[owners] = True
    for item, owner in enumerate(owners):
        if answers[owners[order[item]]] == answers[owner]:
            shuffled[owner] = False
    index = torch.tensor(order, device=media.num_tokens.device)
    exchanged = replace(
        media,
        tensors={name: tensor[index] for name, tensor in media.tensors.items()},
    )
    return replace(batch, media={**batch.media, modality: exchanged}), shuffled


def roll_past_equals(values: Sequence[Hashable]) -> list[int]:
    """A permutation that gives each place one with another value wherever that can be.

    Places are sorted by value and rolled by the size of the largest group of equals: no place then
    meets its own value unless that group is more than half of all.
    """
    if not values:
        return []
    first: dict[Hashable, int] = {}
    for place, value in enumerate(values):
        first.setdefault(value, place)
    places = sorted(range(len(values)), key=lambda i: (first[values[i]], i))
    shift = max(Counter(values).values())
    partner = [0] * len(places)
    for i, place in enumerate(places):
        partner[place] = places[(i + shift) % len(places)]
    return partner


def _owners(batch: Batch, modality: str) -> list[int]:
    """The sample of each item."""
    media = batch.media[modality]
    starts = media.num_tokens.cumsum(0) - media.num_tokens
    return batch.segment_ids.flatten()[media.slots[starts]].tolist()


def _answers(batch: Batch) -> list[tuple[int, ...]]:
    """The trained ids of each sample."""
    rows, places = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    labels = batch.labels[rows, places].tolist()
    answers: list[list[int]] = [[] for _ in batch.samples]
    for sample, label in zip(batch.segment_ids[rows, places].tolist(), labels, strict=True):
        answers[sample].append(label)
    return [tuple(answer) for answer in answers]
