"""What travels through mmfusion, in the order it is made: Sample -> PlannedSample -> EncodedSample
-> Batch -> ModelOutput.

A *sample* is a conversation whose messages hold text and media. The processor first *plans* it
(token ids and slot counts, from headers alone), the packer lays planned samples into packs, then
the media are decoded and the packs collated into a *batch*. Shape letters: B rows, T tokens of a
row, N media items of a modality in the batch, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from operator import itemgetter
from typing import Any, Literal, cast

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is not trained (Hugging Face's convention)."""

CAPTION = "text."
"""How the names of a target's tensors begin that hold the encoding of its caption."""

Role = Literal["system", "user", "assistant"]
MediaTensors = dict[str, Tensor]
"""What a media processor makes of one item, or (with a leading N) of the N items of a batch."""


class DataError(ValueError):
    """A sample that cannot be used: corrupt, empty, too long, too large. Deterministic, so it is
    skipped and counted.

    Args:
        reason: a short stable code the error is counted under, e.g. ``corrupt_image``.
        message: what, got, expected, do this.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Text:
    """A piece of text inside a message.

    Attributes:
        text: the words.
        spoken: in an assistant turn, words to be said aloud: they stand between the signal tokens
            of speech.
        sound: of an answer, what a speaker made of the words.
    """

    text: str
    spoken: bool = False
    sound: Media | None = None


@dataclass(frozen=True)
class Media:
    """One encoded media file, or a span of it.

    Attributes:
        modality: ``image``, ``video`` or ``audio``.
        data: the file's bytes, as stored.
        format: the file's extension without the dot, lower case (``jpg``, ``ogg``, ``mp4``).
        start, end: seconds; the part of a video or audio file to use (None: from the start, to the
            end).
        caption: what it shows, in words; of media in an assistant turn, the text that a generator
            would be given to make it.
        stored: what frozen parts made of it, as a safetensors file; None for media of sources
            without stored features, empty where they should be there.
    """

    modality: str
    data: bytes = field(repr=False)
    format: str
    start: float | None = None
    end: float | None = None
    caption: str | None = None
    stored: bytes | None = field(default=None, repr=False)

    @property
    def words(self) -> str:
        """Its caption as generators take it, so that the same words are the same caption: one space
        between two, none around them; empty where there is no caption.
        """
        return " ".join((self.caption or "").split())


@dataclass(frozen=True)
class Message:
    """One turn. Media in a user turn is input, in an assistant turn a generator's target."""

    role: Role
    content: tuple[Text | Media, ...]


@dataclass(frozen=True)
class SampleRef:
    """Which sample, of which pass over which source.

    Attributes:
        source: name of the source in the recipe's mixture.
        epoch: how many times the source was passed over before.
        index: place of the sample in the source, in shard order.
        position: global position g in the stream (-1 outside the training stream).
    """

    source: str
    epoch: int
    index: int
    position: int = -1


@dataclass(frozen=True)
class Sample:
    """Messages with text and media, as a converter makes them.

    Attributes:
        messages: turns in order.
        format: ``chat`` renders through the tokenizer's chat template; ``plain`` (captions in
            pretraining) joins the contents after one start token, without roles.
        eos: a ``plain`` sample ends with the tokenizer's end token, trained (``chat`` samples end
            as their template says).
        shard, key: where it came from, for error lists and reports.
    """

    messages: tuple[Message, ...]
    format: Literal["chat", "plain"] = "chat"
    eos: bool = False
    shard: str = ""
    key: str = ""

    @property
    def media(self) -> list[Media]:
        """Input media in reading order."""
        return self._media(answers=False)

    @property
    def targets(self) -> list[Media]:
        """Media of assistant turns in reading order."""
        return self._media(answers=True)

    def _media(self, answers: bool) -> list[Media]:
        return [
            part
            for message in self.messages
            if (message.role == "assistant") == answers
            for part in message.content
            if isinstance(part, Media)
        ]


@dataclass(frozen=True)
class MediaSlots:
    """Where one media item goes: ``num_tokens`` placeholder slots from ``start``, fed by
    ``num_features`` features.
    """

    modality: str
    num_features: int
    num_tokens: int
    start: int


@dataclass(frozen=True)
class SignalSlots:
    """Where the signal tokens of one target are: ``num_tokens`` from ``start``."""

    modality: str
    num_tokens: int
    start: int


@dataclass(frozen=True)
class PlannedSample:
    """Everything about a sample but the decoded media; enough to pack it.

    Attributes:
        input_ids: (T,) int64; media slots hold the modality's placeholder id.
        trained: (T,) bool; True where the token is a prediction target.
        media: slots of each input item in reading order.
        targets: signal tokens of each target in reading order.
    """

    input_ids: Tensor
    trained: Tensor
    media: tuple[MediaSlots, ...]
    targets: tuple[SignalSlots, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class EncodedSample:
    """A planned sample with its media decoded.

    Attributes:
        tensors: for each entry of ``planned.media``, what its media processor made.
        targets: for each entry of ``planned.targets``, what its generator's processor made.
        captions: of the targets; empty where there is none.
        ref, shard, key: where it came from.
    """

    planned: PlannedSample
    tensors: tuple[MediaTensors, ...]
    targets: tuple[MediaTensors, ...] = ()
    captions: tuple[str, ...] = ()
    ref: SampleRef | None = None
    shard: str = ""
    key: str = ""


class _Tensors:
    """Gives a dataclass ``to`` and ``pin_memory``, through nested dicts and dataclasses
    (Lightning's transfer looks for them).
    """

    def to(self, *args: Any, **kwargs: Any) -> Any:
        # Torch keeps pinned memory until a copy from it is done; other memory is copied at once.
        return _map(
            self, lambda t: t.to(*args, **{"non_blocking": t.device.type == "cpu", **kwargs})
        )

    def pin_memory(self) -> Any:
        return _map(self, lambda tensor: tensor.pin_memory())


@dataclass
class MediaBatch(_Tensors):
    """The items of one modality in a batch, in reading order.

    Attributes:
        tensors: each with leading N, as the media processor's ``collate`` made them.
        num_features: (N,) int64, valid features of each item out of the encoder.
        num_tokens: (N,) int64, placeholder slots of each item; their sum is ``len(slots)``.
        slots: (sum of num_tokens,) int64, positions in the flattened (B*T) batch, in reading order.
        idle: True where the batch has no item of this modality: one idle item with no slots keeps
            the graph the same on every rank; its features reach no loss.
    """

    tensors: MediaTensors
    num_features: Tensor
    num_tokens: Tensor
    slots: Tensor
    idle: bool = False


@dataclass
class TargetBatch(_Tensors):
    """The targets of one modality in a batch, in reading order. M targets, S signal tokens of each.

    Attributes:
        tensors: each with leading M, as the generator's target processor collated them.
        slots: (M, S) int64, positions of the signal tokens in the flattened (B*T) batch.
        segments: (M,) int64, index of each target's sample.
        keys: (M,) int64, what each target's noise is drawn from.
        captions: M texts; empty where there is none.
        idle: True where the batch has no target of this modality: one idle target without signal
            tokens keeps the graph the same on every rank; its loss is zero.
    """

    tensors: MediaTensors
    slots: Tensor
    segments: Tensor
    keys: Tensor
    captions: list[str]
    idle: bool = False


@dataclass
class Captions(_Tensors):
    """Distinct captions of targets of one modality, sorted.

    Attributes:
        captions: K texts.
        tensors: their encodings, each with leading K, where these came with the targets.
    """

    captions: list[str]
    tensors: MediaTensors


@dataclass
class Conditioning(_Tensors):
    """What a generator is conditioned on. M items.

    Attributes:
        tokens: (M, C, D_g).
        pooled: (M, P), for generators that take such a vector as well.
        mask: (M, C) bool, True on valid tokens; None: all are.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """(M, C) bool, the mask also where none is given."""
        if self.mask is None:
            return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)
        return self.mask

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """With each of its tensors changed."""
        return cast(Conditioning, _map(self, change))

    def split(self) -> list[Conditioning]:
        """Its items, each alone."""
        return [self.map(itemgetter(slice(i, i + 1))) for i in range(len(self.tokens))]

    @staticmethod
    def cat(given: Sequence[Conditioning]) -> Conditioning:
        """The items of several, of one generator, one after the other."""
        found: dict[str, Any] = {}
        for name in ("tokens", "pooled", "mask"):
            rows = [getattr(one, name) for one in given]
            found[name] = None if rows[0] is None else torch.cat(rows)
        return Conditioning(**found)


@dataclass(frozen=True)
class ConditioningSpec:
    """The conditioning a generator takes, which is its text encoder's shapes; or what an output
    projector gives for an item.

    Attributes:
        tokens: C.
        dim: D_g.
        pooled_dim: P, 0 where it takes none.
    """

    tokens: int
    dim: int
    pooled_dim: int = 0

    def blank(self) -> Conditioning:
        """Of one item, of these shapes but without values."""
        pooled = torch.empty(1, self.pooled_dim, device="meta") if self.pooled_dim else None
        return Conditioning(torch.empty(1, self.tokens, self.dim, device="meta"), pooled)


@dataclass
class Batch(_Tensors):
    """One micro-batch: packs laid end to end in one row (B = 1, ``cu_seqlens`` set), or padded rows
    (``cu_seqlens`` None).

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64; ``input_ids`` where trained, else IGNORE_INDEX. Not shifted: the label
            at t is predicted from the hidden state at t-1, and the first token of a sample is never
            a label.
        position_ids: (B, T) int64, from 0 in every sample.
        cu_seqlens: (S+1,) int32, sample borders in the row, or None where rows are samples padded
            on the right.
        segment_ids: (B, T) int64, index into ``samples``, -1 on padding.
        media: one entry for every modality that the model takes, idle or not.
        targets: one entry for every modality that it makes, idle or not.
        step_counts: () int64 each, in ALL micro-batches of this optimizer step on this rank:
            supervised ``tokens``, and targets by modality. Summed over ranks they normalise the
            losses.
        step_captions: by modality, the captions of the targets in ALL micro-batches of this
            optimizer step on this rank, where an objective reads them; with its first micro-batch
            alone.
        samples: one entry a sample, in order.
        stream: what to commit when the optimizer step that ends with this batch completes (opaque
            to the model).
        bounds: where the part of each rank begins, and the last one ends, in a row that several
            ranks share; None where one rank runs it whole.
        host: the batch as it was before ``to`` moved it. What is counted and checked is read there,
            so that nothing waits for the accelerator.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None
    segment_ids: Tensor
    media: dict[str, MediaBatch]
    targets: dict[str, TargetBatch]
    step_counts: dict[str, Tensor]
    step_captions: dict[str, Captions] = field(default_factory=dict)
    samples: list[BatchSample] = field(default_factory=list)
    stream: Any = None
    bounds: tuple[int, ...] | None = None
    _host: Batch | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def host(self) -> Batch:
        return self._host or self

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        moved = super().to(*args, **kwargs)
        moved._host = self.host
        return moved


@dataclass(frozen=True)
class BatchSample:
    """Provenance of a sample in a batch (kept on the host)."""

    ref: SampleRef
    shard: str
    key: str


@dataclass
class ModelOutput:
    """What ``AnyToAnyModel.forward`` gives to the objectives.

    Attributes:
        hidden_states: (B, T, D), after the LLM's last norm.
        media_tokens: projected media by modality, (N, P, D).
        conditioning: for each modality the model makes, that of its M targets.
        idle: () zero, in the graph of every idle row; whoever sums the losses adds it.
    """

    hidden_states: Tensor
    media_tokens: dict[str, Tensor]
    conditioning: dict[str, Conditioning]
    idle: Tensor


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, _Tensors) and is_dataclass(value):
        names = [f.name for f in fields(value) if f.init]
        return replace(value, **{name: _map(getattr(value, name), function) for name in names})
    return value
