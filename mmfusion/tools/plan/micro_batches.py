"""Micro-batches to plan with: the first of the recipe's own data where they can be read, else made
up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle

from mmfusion.data.collate import collate
from mmfusion.data.datamodule import MultimodalData
from mmfusion.data.loader import make_micro_batches
from mmfusion.data.stream import Stream
from mmfusion.processing.processor import Processor
from mmfusion.tools.describe import EXAMPLES
from mmfusion.types import Batch, EncodedSample, Media, Message, Sample, SampleRef, Text

MOST = 3
"""Micro-batches that are looked at."""
WORDS = 64
"""Of a sample that is made up."""


@dataclass(frozen=True)
class Given:
    """Micro-batches of rank 0.

    Attributes:
        batches: some of them.
        origin: where they are from, for the report.
        packs: mean packs of a micro-batch.
        pack_tokens: mean tokens of a pack, without padding.
        real: whether they are the recipe's own data.
    """

    batches: list[Batch]
    origin: str
    packs: float
    pack_tokens: float
    real: bool


def micro_batches(data: MultimodalData, processor: Processor, world: int) -> Given:
    """Those that rank 0 of ``world`` sees first.

    Raises:
        ValueError, OSError: where the data cannot be read.
    """
    data.attach(processor)
    division = data.division(0, world)
    stream, size = Stream(data.state, data.sources, processor), division.packs_per_micro_batch
    found: list[tuple[Batch, int]] = []
    step = 0
    while len(found) < MOST:
        count = data.packs_per_step
        local = stream.local_step(step, step * count, count, 0, division.world)
        made = make_micro_batches(local, division, processor, data.pad_rows)
        packs = [len(local.packs[i * size : (i + 1) * size]) for i in range(len(made))]
        pairs = [pair for pair in zip(made, packs, strict=True) if pair[0].samples]
        if not pairs:
            break
        found += pairs
        step += 1
    found = found[:MOST]
    if not found:
        raise ValueError("the data give no pack; see the checks of data.sources.")
    batches, total = [batch for batch, _ in found], sum(packs for _, packs in found)
    tokens = sum(int((batch.segment_ids >= 0).sum()) for batch in batches)
    origin = f"the first {len(batches)} of the recipe's data"
    return Given(batches, origin, total / len(batches), tokens / total, real=True)


def made_up(data: MultimodalData, processor: Processor, world: int) -> Given:
    """A micro-batch of packs of samples that have an item each, of the modalities in turn, and a
    few dozen words; where no example fits, of words alone.
    """
    takers = max(1, world // data.ranks_per_pack)
    count = min(data.packs_per_micro_batch, -(-data.packs_per_step // takers))
    kinds, left_out = _kinds(processor, data.pack_tokens)
    pack: list[EncodedSample] = []
    room = data.pack_tokens
    for kind in cycle(kinds):
        if len(kind.planned) > room:
            break
        pack.append(kind)
        room -= len(kind.planned)
    refs = [SampleRef("made up", 0, index, index) for index in range(count * len(pack))]
    samples = [replace(s, ref=ref) for s, ref in zip(pack * count, refs, strict=True)]
    names = [media for media in (*processor.media, *processor.targets) if media not in left_out]
    origin = f"made-up samples of {' and '.join([*dict.fromkeys(names), 'words'])}"
    if left_out:
        origin += f", without {' and '.join(left_out)}"
    batch = collate(samples, processor, data.pad_rows)
    return Given([batch], origin, count, data.pack_tokens - room, real=False)


def _kinds(processor: Processor, pack_tokens: int) -> tuple[list[EncodedSample], list[str]]:
    """A sample of each modality, and the modalities of which none can be made or none fits."""
    found: list[EncodedSample] = []
    left_out: list[str] = []
    for modality in (*processor.media, *processor.targets):
        try:
            _, make = EXAMPLES[modality]
            kind = processor.encode(_sample(make(), modality in processor.media))
            if len(kind.planned) > pack_tokens:
                raise ValueError(f"an example takes {len(kind.planned)} tokens")
            found.append(kind)
        except (KeyError, ValueError):
            left_out.append(modality)
    return found or [_words(processor, pack_tokens)], left_out


def _sample(media: Media, reads: bool) -> Sample:
    """An item and words about it, or words and the item that is made of them."""
    words = " ".join(["words"] * WORDS)
    if reads:
        messages = (Message("user", (media,)), Message("assistant", (Text(words),)))
    else:
        made = replace(media, caption=words)
        messages = (Message("user", (Text(words),)), Message("assistant", (made,)))
    return Sample(messages, format="plain")


def _words(processor: Processor, pack_tokens: int) -> EncodedSample:
    """As many as fill a pack."""
    count = pack_tokens
    while count > 0:
        text = Text(" ".join(["words"] * count))
        messages = (Message("user", (Text("words"),)), Message("assistant", (text,)))
        kind = processor.encode(Sample(messages, format="plain"))
        if len(kind.planned) <= pack_tokens:
            return kind
        count = count * pack_tokens // len(kind.planned) - 1
    raise ValueError(f"data.pack_tokens is {pack_tokens}, which no sample fits into.")
