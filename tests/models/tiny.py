"""Tiny random models saved to disk, to be loaded by the real code; and batches made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from mmfusion.audit import check_reaches_loss
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.encoders.base import Encoder
from mmfusion.models.llms.hf_causal_lm import HFCausalLM
from mmfusion.objectives.next_token import NextToken
from mmfusion.processing.base import MediaProcessor
from mmfusion.tuning import ParamGroup
from mmfusion.types import (
    IGNORE_INDEX,
    Batch,
    BatchSample,
    Media,
    MediaBatch,
    MediaTensors,
    SampleRef,
)

VOCABULARY = 60
WORDS = 40
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    words = ["<unk>", "<s>", "</s>", "user", "assistant", *(f"w{i}" for i in range(WORDS - 5))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def llama_config(**changes: Any) -> LlamaConfig:
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**{**options, **changes})


def save_llm(folder: Path, config: Any = None, **changes: Any) -> str:
    """A random causal LM (LLaMA unless ``config`` says otherwise) with a tokenizer of words."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or llama_config(**changes))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def clip_config(**changes: Any) -> CLIPVisionConfig:
    options: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "initializer_factor": 1.0,
    }
    return CLIPVisionConfig(**{**options, **changes})


def save_clip(folder: Path) -> str:
    """A random CLIP vision tower with its image processor's settings."""
    from transformers import CLIPImageProcessorPil

    torch.manual_seed(1)
    CLIPVisionModel(clip_config()).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return str(folder)


class TinyEncoder(Encoder):
    """Vectors of 6 numbers, ``x`` (N, F, 6), through one linear layer to width 8."""

    def __init__(self, modality: str = "image", trains: bool = False) -> None:
        super().__init__()
        self.modality, self.trains, self.calls = modality, trains, 0

    @property
    def out_dim(self) -> int:
        return 8

    def build(self, pretrained: bool = True) -> None:
        torch.manual_seed(2)
        self.linear = nn.Linear(6, 8).requires_grad_(self.trains)

    def media_processor(self) -> MediaProcessor:
        return TinyProcessor(self.modality)

    def forward(self, tensors: MediaTensors) -> Tensor:
        self.calls += 1
        return self.linear(tensors["x"])


class TinyProcessor(MediaProcessor):
    """One feature a byte of the file, at most 4."""

    def __init__(self, modality: str) -> None:
        self.modality = modality

    def num_features(self, media: Media) -> int:
        return min(4, len(media.data))

    def __call__(self, media: Media, rng: Any = None) -> MediaTensors:
        count = self.num_features(media)
        x = torch.zeros(4, 6)
        x[:count] = torch.tensor(list(media.data[:count]))[:, None] / 10 + torch.arange(6)
        return {"x": x}

    def idle(self) -> MediaTensors:
        return {"x": torch.zeros(4, 6)}


def tiny_model(folder: Path, projectors: dict[str, Any], **options: Any) -> AnyToAnyModel:
    """A model with a :class:`TinyEncoder` for each projector, built."""
    trains = options.pop("encoder_trains", False)
    path = str(folder) if (folder / "config.json").exists() else save_llm(folder)
    torch.manual_seed(3)
    model = AnyToAnyModel(
        encoders={name: TinyEncoder(name, trains) for name in projectors},
        input_projectors=projectors,
        llm=HFCausalLM(path, **options),
    )
    model.build()
    return model


def make_batch(
    model: AnyToAnyModel,
    samples: Sequence[Sequence[Any]],
    packed: bool = True,
    prompt: int = 1,
) -> Batch:
    """A batch by hand: each sample is a list of word ids and ``(modality, bytes)`` media items.

    Every text token after the first ``prompt`` ones is supervised.
    """
    ids, labels, media = [], [], {name: [] for name in model.encoders}
    processor = model.processor()
    for sample in samples:
        sample_ids: list[int] = []
        sample_labels: list[int] = []
        for part in sample:
            if isinstance(part, int):
                sample_labels.append(part if len(sample_ids) >= prompt else IGNORE_INDEX)
                sample_ids.append(part)
            else:
                name, data = part
                item = Media(name, data, "bin")
                features = processor.media[name].num_features(item)
                count = model.input_projectors[name].num_tokens(features)
                media[name].append((len(ids), len(sample_ids), features, count, item))
                sample_ids += [processor.placeholder_ids[name]] * count
                sample_labels += [IGNORE_INDEX] * count
        ids.append(sample_ids)
        labels.append(sample_labels)
    length = sum(map(len, ids)) if packed else max(map(len, ids))
    starts = []
    for index in range(len(ids)):
        starts.append(sum(map(len, ids[:index])) if packed else index * length)
    shape = (1 if packed else len(ids)) * length
    flat = torch.full((shape,), 2)
    flat_labels, segments, positions = flat * 0 + IGNORE_INDEX, flat * 0 - 1, flat * 0
    for index, (start, sample_ids, sample_labels) in enumerate(
        zip(starts, ids, labels, strict=True)
    ):
        span = slice(start, start + len(sample_ids))
        flat[span], flat_labels[span] = torch.tensor(sample_ids), torch.tensor(sample_labels)
        segments[span], positions[span] = index, torch.arange(len(sample_ids))
    lengths = torch.tensor([0, *map(len, ids)])
    return Batch(
        input_ids=flat.view(-1, length),
        labels=flat_labels.view(-1, length),
        position_ids=positions.view(-1, length),
        cu_seqlens=lengths.cumsum(0).int() if packed else None,
        segment_ids=segments.view(-1, length),
        media={name: _media_batch(processor, name, media[name], starts) for name in media},
        targets={},
        step_counts={"tokens": (flat_labels != IGNORE_INDEX).sum()},
        samples=[BatchSample(SampleRef("s", 0, i), "shard", str(i)) for i in range(len(ids))],
    )


def _media_batch(processor: Any, name: str, items: list[Any], starts: list[int]) -> MediaBatch:
    handler = processor.media[name]
    if not items:
        tensors = handler.collate([handler.idle()])
        none = torch.zeros(0, dtype=torch.int64)
        return MediaBatch(tensors, torch.tensor([4]), torch.tensor([0]), none, idle=True)
    slots = [torch.arange(count) + starts[row] + at for row, at, _, count, _ in items]
    return MediaBatch(
        tensors=handler.collate([handler(item) for *_, item in items]),
        num_features=torch.tensor([features for _, _, features, _, _ in items]),
        num_tokens=torch.tensor([count for _, _, _, count, _ in items]),
        slots=torch.cat(slots),
    )


def train_step(model: AnyToAnyModel, groups: list[ParamGroup], samples: Sequence[Any]) -> None:
    """One step on the samples of :func:`make_batch`, with the audit of the gradients."""
    batch = make_batch(model, samples)
    output = model(batch)
    (NextToken()(model, output, batch).total + output.idle).backward()
    check_reaches_loss(model)
    torch.optim.AdamW(groups, lr=1.0).step()
