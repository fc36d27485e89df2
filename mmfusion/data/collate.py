"""Packs of encoded samples -> Batch.

Either all samples laid end to end in one row (B = 1, no padding), or one padded row a sample. Media
items keep reading order; a modality without items gets one idle item, so that every rank runs the
same graph. B rows, T tokens of a row, N items of a modality, S samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfusion.processing.processor import Processor
from mmfusion.types import (
    CAPTION,
    IGNORE_INDEX,
    Batch,
    BatchSample,
    Captions,
    EncodedSample,
    MediaBatch,
    MediaTensors,
    SampleRef,
    TargetBatch,
)


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
        A batch whose ``step_counts`` and ``step_captions`` are its own; the loader sets the step's.

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
    starts = [row * width + start for row, start in places]
    targets = _targets(samples, starts, processor)
    batch = Batch(
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        cu_seqlens=None if pad_rows else borders,
        segment_ids=segments,
        media=_media(samples, starts, processor),
        targets=targets,
        step_counts={
            "tokens": (labels != IGNORE_INDEX).sum(),
            **{name: torch.tensor(0 if t.idle else len(t.slots)) for name, t in targets.items()},
        },
        # Only where they are read: stored encodings, of all targets of a step, can be large.
        step_captions={
            name: _captions_of(target)
            for name, target in targets.items()
            if name in processor.step_captions
        },
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


def _targets(
    samples: Sequence[EncodedSample], starts: Sequence[int], processor: Processor
) -> dict[str, TargetBatch]:
    """Targets of every modality that the model makes."""
    found: dict[str, list[tuple[MediaTensors, Tensor, int, int, str]]]
    found = {modality: [] for modality in processor.targets}
    for s, (sample, start) in enumerate(zip(samples, starts, strict=bool(samples))):
        planned = zip(sample.planned.targets, sample.targets, sample.captions, strict=True)
        for number, (slots, tensors, caption) in enumerate(planned):
            first = start + slots.start
            place = torch.arange(first, first + slots.num_tokens)
            key = _noise_key(sample.ref, number)
            found[slots.modality].append((tensors, place, s, key, caption))
    return {
        modality: _target_batch(modality, items, processor) for modality, items in found.items()
    }


def _target_batch(
    modality: str, items: list[tuple[MediaTensors, Tensor, int, int, str]], processor: Processor
) -> TargetBatch:
    target = processor.targets[modality]
    if not items:
        none = torch.zeros(1, dtype=torch.int64)
        return TargetBatch(
            tensors=target.collate([target.idle()]),
            slots=torch.zeros(1, processor.signal_tokens[modality], dtype=torch.int64),
            segments=none,
            keys=none,
            captions=[""],
            idle=True,
        )
    tensors, places, segments, keys, captions = zip(*items, strict=True)
    return TargetBatch(
        tensors=target.collate(tensors),
        slots=torch.stack(places),
        segments=torch.tensor(segments),
        keys=torch.tensor(keys),
        captions=list(captions),
    )


def _captions_of(target: TargetBatch) -> Captions:
    if target.idle:
        return Captions([], {})
    encodings = {name: x for name, x in target.tensors.items() if name.startswith(CAPTION)}
    return distinct(Captions(target.captions, encodings))


def distinct(given: Captions) -> Captions:
    """Each caption once, sorted."""
    firsts = {caption: place for place, caption in reversed([*enumerate(given.captions)])}
    captions = sorted(firsts)
    places = torch.tensor([firsts[caption] for caption in captions], dtype=torch.int64)
    return Captions(captions, {name: x[places] for name, x in given.tensors.items()})


def _noise_key(ref: SampleRef | None, number: int) -> int:
    """What a target's noise is drawn from: another one in each epoch, the same on any rank."""
    assert ref is not None, "the loader names every sample"
    text = f"{ref.source}/{ref.epoch}/{ref.index}/{ref.position}/{number}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


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
