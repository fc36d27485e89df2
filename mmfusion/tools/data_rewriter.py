"""Runs frozen parts on the media of samples, and writes the samples again with what they give: the
work of :mod:`mmfusion.tools.data_encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from tqdm import tqdm

from mmfusion.data.features import INPUT, MEMBER, TARGET, numbered
from mmfusion.data.source import Source
from mmfusion.data.whole_file import write_whole
from mmfusion.data.writer import ShardWriter
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.encoders.base import Encoder
from mmfusion.models.generators.base import TEXT_ENCODER, VAE
from mmfusion.models.generators.stored import with_moments, with_text
from mmfusion.processing.base import MediaProcessor
from mmfusion.processing.stored import FEATURES, Spec, item_file, read_header
from mmfusion.training.stored_parts import empty_file, split_part
from mmfusion.types import CAPTION, DataError, Media, MediaTensors

WHOLE_SHARD = 1 << 60
"""A shard of features holds the samples of one shard of the source, however large they are."""
MediaOption = Literal["beside", "instead"]


class Runner:
    """Runs the chosen parts on batches of items.

    Args:
        model: of the recipe; the chosen parts are built.
        parts: their names.
        trainer: gives device and precision.
        batch_size: of a batch.
    """

    def __init__(
        self, model: AnyToAnyModel, parts: Sequence[str], trainer: L.Trainer, batch_size: int
    ) -> None:
        self.model, self.parts, self.batch_size = model, list(parts), batch_size
        self.device: torch.device = trainer.strategy.root_device
        self._context: Callable[[], AbstractContextManager[Any]]
        self._context = trainer.precision_plugin.forward_context
        self.processors: dict[tuple[str, str], MediaProcessor] = {}
        """By kind of item and modality, where something is stored of it."""
        for part in parts:
            kind, modality, of = split_part(part)
            if kind == "encoders":
                encoder = self._encoder(modality)
                encoder.build()
                encoder.to(self.device).eval().requires_grad_(False)
                self.processors[INPUT, modality] = encoder.media_processor()
            else:
                generator = model.generator(modality)
                generator.build([of])
                generator.to(self.device).eval().requires_grad_(False)
                self.processors[TARGET, modality] = generator.target_processor()

    def _encoder(self, modality: str) -> Encoder:
        return cast(Encoder, self.model.encoders[modality])

    @torch.no_grad()
    def run(
        self, kind: str, modality: str, items: Sequence[MediaTensors], captions: Sequence[str]
    ) -> list[MediaTensors]:
        """What is stored of items of one kind; features are those of the whole batch, padded."""
        tensors = self.processors[kind, modality].collate(items)
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        found: MediaTensors = {}
        with self._context():
            if kind == INPUT:
                found = {FEATURES: self._encoder(modality)(tensors)}
            else:
                generator = self.model.generator(modality)
                if f"generators.{modality}.{VAE}" in self.parts:
                    found |= with_moments(generator.moments(tensors))
                if f"generators.{modality}.{TEXT_ENCODER}" in self.parts:
                    found |= with_text(generator.encode_text(captions))
        rows = {name: tensor.cpu().unbind() for name, tensor in found.items()}
        return [{name: row[i] for name, row in rows.items()} for i in range(len(items))]

    def specs(self, part: str) -> dict[str, Spec]:
        """Types and shapes of a part's tensors of an item, from the idle one."""
        kind, modality, of = split_part(part)
        what = INPUT if kind == "encoders" else TARGET
        (found,) = self.run(what, modality, [self.processors[what, modality].idle()], [""])
        prefix = {"": FEATURES, VAE: "latents.", TEXT_ENCODER: CAPTION}[of]
        own = {name: tensor for name, tensor in found.items() if name.startswith(prefix)}
        specs = read_header(item_file(own, {}))[0]
        if what == TARGET:
            return specs
        dtype, shape = specs[FEATURES]
        return {FEATURES: (dtype, (None, *shape[1:]))}  # items differ in length

    @torch.no_grad()
    def write_empty(self, folder: Path) -> None:
        """The text encodings of ""."""
        for _, modality, of in map(split_part, self.parts):
            if of == TEXT_ENCODER:
                with self._context():
                    text = with_text(self.model.generator(modality).encode_empty())
                with write_whole(str(empty_file(folder, modality))) as file:
                    file.write(item_file({n: tensor[0] for n, tensor in text.items()}, {}))


@dataclass
class _Item:
    """One medium on its way; without a processor, nothing is stored of it."""

    name: str
    media: Media
    processor: MediaProcessor | None
    about: dict[str, str]
    tensors: MediaTensors | None = None
    stored: MediaTensors | None = None

    @property
    def kind(self) -> tuple[str, str]:
        """Kind and modality."""
        return self.name.partition(".")[0], self.media.modality


class Rewriter:
    """Writes the samples of a source again, with what is stored of their media.

    Args:
        source: read sample by sample.
        runner: of the stored parts.
        media: ``beside`` keeps them, ``instead`` leaves out those that nothing else reads.
        pool: decodes them.
    """

    def __init__(self, source: Source, runner: Runner, media: MediaOption, pool: Executor) -> None:
        self.source, self.runner, self.media, self.pool = source, runner, media, pool

    def write(self, shard: int, pattern: str, progress: tqdm) -> None:
        """One shard."""
        counts = self.source.shards.counts
        first, last = sum(counts[:shard]), sum(counts[: shard + 1])
        size = 2 * self.runner.batch_size
        with ShardWriter(pattern, WHOLE_SHARD, WHOLE_SHARD, overwrite=True) as writer:
            for begin in range(first, last, size):
                for key, record in self._records(range(begin, min(begin + size, last))):
                    try:
                        writer.write(key, record)
                    except ValueError as error:
                        raise ValueError(f"{self.source.shards.paths[shard]}: {error}") from None
                    progress.update()

    def _records(self, indices: Sequence[int]) -> Iterator[tuple[str, dict[str, bytes]]]:
        records = [self.source.shards.read(index) for index in indices]
        items = [self._items(*one) for one in records]
        wanted = [item for own in items for item in own if item.processor is not None]
        for item, prepared in zip(wanted, self.pool.map(_prepare, wanted), strict=True):
            item.tensors = prepared
        for kind in self.runner.processors:
            own = [item for item in wanted if item.kind == kind and item.tensors is not None]
            for begin in range(0, len(own), self.runner.batch_size):
                self._run(kind, own[begin : begin + self.runner.batch_size])
        for (record, _, key), own in zip(records, items, strict=True):
            yield key, self._record(record, own)

    def _items(self, record: Mapping[str, bytes], shard: str, key: str) -> list[_Item]:
        if held := sorted(name for name in record if MEMBER.fullmatch(name)):
            raise ValueError(
                f"{shard}: sample {key} holds stored features already ({held[0]}); encode the "
                "shards that they were made from."
            )
        try:
            sample = self.source.converter(record, shard, key)
        except DataError:  # found again, and counted, where it is read
            return []
        items = [_Item(name, media, None, {}) for name, media in numbered(sample)]
        return [replace(item, processor=self.runner.processors.get(item.kind)) for item in items]

    def _run(self, kind: tuple[str, str], items: Sequence[_Item]) -> None:
        tensors = [item.tensors for item in items if item.tensors is not None]
        captions = [item.media.words for item in items]
        for item, found in zip(items, self.runner.run(*kind, tensors, captions), strict=True):
            item.stored = _own_length(item, found)
            item.tensors = None

    def _record(self, record: Mapping[str, bytes], items: Sequence[_Item]) -> dict[str, bytes]:
        """The record, features beside its media or instead of them."""
        kept = dict(record)
        read_live = [item.media.data for item in items if not self._replaces(item)]
        for item in items:
            # One member an item: others with the same bytes are of other items, or of none.
            name = next((n for n, data in kept.items() if data == item.media.data), None)
            if self.media == "instead" and name and item.media.data not in read_live:
                item.about["instead_of"] = name
                del kept[name]
        stored = [item for item in items if item.processor is not None]
        return {**kept, **{one.name: item_file(one.stored or {}, one.about) for one in stored}}

    def _replaces(self, item: _Item) -> bool:
        """Whether nothing is left that reads the medium itself."""
        if item.processor is None:
            return False
        kind, modality = item.kind
        live = kind == TARGET and VAE in self.runner.model.needs[modality]
        return not live or f"generators.{modality}.{VAE}" in self.runner.parts


def _prepare(item: _Item) -> MediaTensors | None:
    """Decode; an error of the medium is kept, to be raised where it would have been."""
    assert item.processor is not None
    try:
        if item.kind[0] == INPUT:
            item.about["num_features"] = str(int(item.processor.num_features(item.media)))
        return item.processor(item.media, None)
    except DataError as error:
        item.about |= {"error": error.reason, "message": str(error)}
        return None


def _own_length(item: _Item, found: MediaTensors) -> MediaTensors:
    """Features without the batch's padding."""
    if FEATURES not in found:
        return found
    assert item.tensors is not None
    count = item.tensors.get("num_features", item.about["num_features"])
    return {FEATURES: found[FEATURES][: int(count)]}
