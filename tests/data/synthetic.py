"""A small data world with real parts: tars, a converter, a tokenizer, a media processor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmfusion.data.converters.base import Converter
from mmfusion.data.datamodule import MultimodalData
from mmfusion.data.source import Source
from mmfusion.data.writer import ShardWriter
from mmfusion.processing.base import MediaProcessor
from mmfusion.processing.processor import Processor
from mmfusion.types import DataError, Media, MediaTensors, Message, Sample, Text

WORDS = 50


class Bars(MediaProcessor):
    """An image of n bytes is n rows of features; a first byte of 255 is corrupt."""

    modality = "image"

    def num_features(self, media: Media) -> int:
        return len(media.data)

    def __call__(self, media: Media, rng: np.random.Generator | None = None) -> MediaTensors:
        if media.data[0] == 255:
            raise DataError("corrupt_image", "the first byte is 255")
        noise = 0.0 if rng is None else float(rng.random())
        rows = torch.tensor(list(media.data), dtype=torch.float32) + noise
        return {"rows": torch.nn.functional.pad(rows, (0, 8 - len(rows)))}

    def idle(self) -> MediaTensors:
        return {"rows": torch.zeros(8)}


class Words(Converter):
    """`json` {"words": n, "image": [bytes] or absent, "bad": reason or absent} to a caption."""

    def __call__(self, record: Mapping[str, bytes], shard: str, key: str) -> Sample:
        data = json.loads(record["json"])
        if data.get("bad"):
            raise DataError(data["bad"], "made to be bad")
        if data.get("crash"):
            raise ZeroDivisionError("made to crash")
        text = Text(" ".join(f"w{(data['id'] + i) % WORDS}" for i in range(data["words"])))
        images = [Media("image", bytes(image), "bar") for image in data.get("images", [])]
        messages = [Message("user", tuple(images))] if images else []
        return Sample((*messages, Message("assistant", (text,))), "plain")


def make_processor() -> Processor:
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": 3 + i for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return Processor(fast, {"image": Bars()}, {"image": half})


def half(num_features: int) -> int:
    return (num_features + 1) // 2


def write_source(
    folder: Path,
    n: int,
    words: int | tuple[int, int] = (1, 20),
    seed: int = 0,
    bad: Mapping[int, str] | None = None,
    images: bool = True,
    shard_size: int = 7,
) -> str:
    """Write n samples; every third has one or two images. Returns the folder's path."""
    rng = np.random.default_rng(seed)
    low, high = (words, words) if isinstance(words, int) else words
    with ShardWriter(str(folder / "part-%04d.tar"), max_samples=shard_size) as writer:
        for i in range(n):
            record = {"id": i, "words": int(rng.integers(low, high + 1))}
            if images and i % 3 == 0:
                sizes = rng.integers(1, 9, size=1 + i % 2)
                record["images"] = [[int(x) for x in rng.integers(0, 200, size=s)] for s in sizes]
            reason = (bad or {}).get(i)
            if reason == "corrupt_image":
                record["images"] = [[255, 1, 2]]
            elif reason == "crash":
                record["crash"] = True
            elif reason:
                record["bad"] = reason
            writer.write(f"{i:05d}", {"json": json.dumps(record).encode()})
    return str(folder)


def make_data(folders: Mapping[str, str], weights: Mapping[str, float] | None = None, **arguments):
    """A datamodule over written sources, small sizes by default."""
    sizes = {"pack_tokens": 48, "packs_per_step": 4, "lanes": 4, "window": 8, "block": 4}
    sources = {
        name: Source(folder, Words(), (weights or {}).get(name, 1.0))
        for name, folder in folders.items()
    }
    data = MultimodalData(sources, **{**sizes, "num_workers": 0, **arguments})
    data.attach(make_processor())
    return data


def keys_of(batch) -> list[tuple[str, int, int]]:
    """(source, epoch, index) of a batch's samples."""
    return [(s.ref.source, s.ref.epoch, s.ref.index) for s in batch.samples]


def same_tensors(one, other) -> bool:
    """Whether two batches hold the same numbers."""
    names = ("input_ids", "labels", "position_ids", "cu_seqlens", "segment_ids")
    same = all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
    for modality, media in one.media.items():
        there = other.media[modality]
        same &= media.idle == there.idle and torch.equal(media.slots, there.slots)
        same &= torch.equal(media.num_features, there.num_features)
        same &= torch.equal(media.num_tokens, there.num_tokens)
        same &= all(torch.equal(media.tensors[name], there.tensors[name]) for name in media.tensors)
    same &= one.step_counts == other.step_counts
    return same and one.samples == other.samples and one.stream == other.stream
