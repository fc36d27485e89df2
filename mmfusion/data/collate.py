"""Packs of encoded samples -> Batch.

Either all samples laid end to end in one row (B = 1, no padding), or one padded row a sample. Media
items keep reading order; a modality without items gets one idle item, so that every rank runs the
same graph. B rows, T tokens of a row, N items of a modality, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfusion.processing.processor import Processor
from mmfusion.types import IGNORE_INDEX, Batch, BatchSample, EncodedSample, MediaBatch, MediaTensors


def pad_token_id(processor: Processor) -> int:
    """The id that fills empty places; never a label."""
    tokenizer = processor.tokenizer
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def collate(
    samples: Sequence[EncodedSample], processor: Processor, pad_rows: bool = False
) -> Batch:
    """Make a micro-batch of the samples of one or more packs.

    Args:
        samples: S samples in order; none gives one pad token without a label.
        processor: gives the pad token and the media processors.
        pad_rows: one row a sample, padded on the right, instead of all in one row.

    Returns:
        A batch whose ``step_targets`` counts its own labels; the loader sets the step's.

    Raises:
        ValueError: where placeholder slots and media items do not match.
    """
    places = [(0, 0)] if not samples else _places(samples, pad_rows)
    lengths = [len(sample.planned) for sample in samples] or [1]
    rows = max(row for row, _ in places) + 1
    width = max(start + length for (_, start), length in zip(places, lengths, strict=True))
    ids = torch.full((rows, width), pad_token_id(processor), dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE_INDEX)
    positions = torch.zeros_like(ids)
    segments = torch.full_like(ids, -1)
    for s, (sample, (row, start)) in enumerate(zip(samples, places, strict=bool(samples))):
        span = slice(start, start + lengths[s])
        planned = sample.planned
        ids[row, span] = planned.input_ids
        trained = planned.trained.clone()
        trained[0] = False
        labels[row, span] = torch.where(trained, planned.input_ids, IGNORE_INDEX)
        positions[row, span] = torch.arange(lengths[s])
        segments[row, span] = s
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch = Batch(
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        cu_seqlens=None if pad_rows else borders,
        segment_ids=segments,
        media=_media(samples, [row * width + start for row, start in places], processor),
        step_targets=(labels != IGNORE_INDEX).sum(),
        samples=[_provenance(sample) for sample in samples],
    )
    _check_slots(batch, processor)
    return batch


def _places(samples: Sequence[EncodedSample], pad_rows: bool) -> list[tuple[int, int]]:
    """(row, first token) of each sample."""
    if pad_rows:
        return [(row, 0) for row in range(len(samples))]
    ends = [0]
    for sample in samples:
        ends.append(ends[-1] + len(sample.planned))
    return [(0, end) for end in ends[:-1]]


def _media(
    samples: Sequence[EncodedSample], starts: Sequence[int], processor: Processor
) -> dict[str, MediaBatch]:
    """Items of every modality of the model; ``starts`` are places in the flattened (B*T) batch."""
    tensors: dict[str, list[MediaTensors]] = {modality: [] for modality in processor.media}
    features: dict[str, list[int]] = {modality: [] for modality in processor.media}
    slots: dict[str, list[Tensor]] = {modality: [] for modality in processor.media}
    for sample, start in zip(samples, starts, strict=bool(samples)):
        for item, place in zip(sample.tensors, sample.planned.media, strict=True):
            first = start + place.start
            tensors[place.modality].append(item)
            features[place.modality].append(place.num_features)
            slots[place.modality].append(torch.arange(first, first + place.num_tokens))
    return {
        modality: MediaBatch(
            tensors=media.collate(tensors[modality]),
            num_features=torch.tensor(features[modality]),
            num_tokens=torch.tensor([len(run) for run in slots[modality]]),
            slots=torch.cat(slots[modality]),
        )
        if tensors[modality]
        else MediaBatch(
            tensors=media.collate([media.idle()]),
            num_features=torch.ones(1, dtype=torch.int64),
            num_tokens=torch.zeros(1, dtype=torch.int64),
            slots=torch.zeros(0, dtype=torch.int64),
            idle=True,
        )
        for modality, media in processor.media.items()
    }


def _check_slots(batch: Batch, processor: Processor) -> None:
    """Placeholder ids of a modality are at its slots and nowhere else."""
    for modality, media in batch.media.items():
        placeholder = processor.placeholder_ids[modality]
        found = (batch.input_ids.flatten() == placeholder).nonzero().flatten()
        if not torch.equal(found, media.slots):
            names = [f"{s.ref.source}:{s.shard}:{s.key}" for s in batch.samples]
            raise ValueError(
                f"{len(found)} {modality} placeholder tokens are in the batch of {names}, expected "
                f"{len(media.slots)}, one for every media token and at its place; the processor's "
                "plan is wrong."
            )


def _provenance(sample: EncodedSample) -> BatchSample:
    assert sample.ref is not None, "the loader names every sample"
    return BatchSample(sample.ref, sample.shard, sample.key)
