"""The contract between data and model: from a sample to ids, trained mask and media tensors.

Two steps. ``plan`` reads text and media headers only and says how long the sample is and where each
media item goes; the packer works on plans. ``finish`` decodes the media of a sample that was
packed. Data never see the model, and the model never sees a file: both see this.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfusion.processing.base import MediaProcessor
from mmfusion.processing.chat import ChatRenderer
from mmfusion.processing.images import jpeg_decoder
from mmfusion.processing.limits import LimitCheck, Limits
from mmfusion.processing.special_tokens import SPEECH, add_placeholders
from mmfusion.processing.special_tokens import signal_tokens as signals_of
from mmfusion.types import (
    DataError,
    EncodedSample,
    Media,
    MediaSlots,
    MediaTensors,
    Message,
    PlannedSample,
    Sample,
    SampleRef,
    SignalSlots,
    Text,
)


class Processor:
    """Encodes samples for one model. Picklable: loader processes hold a copy.

    Args:
        tokenizer: the LLM's tokenizer. It is copied; placeholder tokens are added to the copy.
        media: the media processor of each modality.
        num_tokens: for each modality, the LLM tokens that F features become (the input
            projector's ``num_tokens``).
        limits: of the LLM; None: it takes anything.
        targets: for each modality the model makes, the target processor of its generator.
        signal_tokens: for each of them, how many signal tokens stand for an item; they are in the
            tokenizer already.
        captioned: modalities whose targets need a caption.
        speaks: the signal tokens of speech are in the tokenizer.
        step_captions: modalities of whose targets batches say the captions of the whole step.

    Attributes:
        tokenizer: the copy, with ``<image>``, ``<video>`` and ``<audio>`` as special tokens.
        media: as given.
        placeholder_ids: id of each modality's placeholder token.
        targets, signal_tokens, step_captions: as given.
        signal_ids: ids of the signal tokens of each modality.
        speech_ids: those before and after words said aloud; None where it does not speak.
    """

    def __init__(
        self,
        tokenizer: Any,
        media: Mapping[str, MediaProcessor],
        num_tokens: Mapping[str, Callable[[int], int]],
        limits: Limits | None = None,
        targets: Mapping[str, MediaProcessor] | None = None,
        signal_tokens: Mapping[str, int] | None = None,
        captioned: Collection[str] = (),
        speaks: bool = False,
        step_captions: Collection[str] = (),
    ) -> None:
        if set(media) != set(num_tokens):
            raise ValueError(
                f"encoders are given for {sorted(media)} and input projectors for "
                f"{sorted(num_tokens)}; each modality needs both."
            )
        self.tokenizer = copy.deepcopy(tokenizer)
        self.media = dict(media)
        self.placeholder_ids = add_placeholders(self.tokenizer, self.media)
        self._num_tokens = dict(num_tokens)
        self.targets, self.signal_tokens = dict(targets or {}), dict(signal_tokens or {})
        signals = {name: signals_of(name, n) for name, n in self.signal_tokens.items()}
        self.signal_ids: dict[str, list[int]] = {
            name: self.tokenizer.convert_tokens_to_ids(tokens) for name, tokens in signals.items()
        }
        self.speech_ids: tuple[int, int] | None = None
        if speaks:
            before, after = self.tokenizer.convert_tokens_to_ids(list(SPEECH))
            self.speech_ids = before, after
        self._captioned = frozenset(captioned)
        self.step_captions = frozenset(step_captions)
        self._renderer = ChatRenderer(
            self.tokenizer, list(self.media), signals, SPEECH if speaks else None
        )
        free = self.placeholder_ids.values()
        self._check = LimitCheck(limits or Limits(), self.tokenizer, free)

    def plan(self, sample: Sample) -> PlannedSample:
        """Ids, trained mask and media slots, without decoding.

        Raises:
            DataError: for a sample that cannot be used.
            ValueError: for media the model has no encoder or no generator for, a chat template that
                cannot be trained on, or tokens the LLM has no embedding for.
        """
        check_answers(sample.messages)
        self._check_modalities(sample)
        bare = [media.modality for media in sample.targets if not media.words]
        if lacking := self._captioned.intersection(bare):
            raise DataError(
                "no_caption",
                f"{sorted(lacking)} in an answer has no caption, which an objective compares its "
                "conditioning with; give captions, or train by denoising alone.",
            )
        if sample.format == "plain":
            ids, trained = self._renderer.plain(sample.messages, sample.eos)
        else:
            ids, trained = self._renderer.chat(sample.messages)
        planned = self._expand(ids, trained, sample)
        self._check.length(len(planned), "the sample", "shorten it or take another LLM")
        if not planned.trained.any():
            raise DataError("nothing_trained", "no token of the sample is trained.")
        return planned

    def finish(
        self,
        sample: Sample,
        planned: PlannedSample,
        rng: np.random.Generator | None = None,
        ref: SampleRef | None = None,
    ) -> EncodedSample:
        """Decode the media of a planned sample.

        Args:
            sample: what was planned.
            planned: its plan.
            rng: draws for augmentation, keyed by the sample.
            ref: which sample it is, kept for reports.

        Raises:
            DataError: for media that do not decode, or decode to another number of features than
                their header promised.
        """
        tensors = []
        for media, slots in zip(sample.media, planned.media, strict=True):
            item = self.media[media.modality](media, rng)
            _check_count(item, slots)
            tensors.append(item)
        goals = sample.targets if planned.targets else []
        return EncodedSample(
            planned,
            tuple(tensors),
            tuple(self.targets[media.modality](media, rng) for media in goals),
            tuple(media.words for media in goals),
            ref,
            sample.shard,
            sample.key,
        )

    def encode(
        self,
        sample: Sample,
        rng: np.random.Generator | None = None,
        ref: SampleRef | None = None,
    ) -> EncodedSample:
        """Plan and finish."""
        return self.finish(sample, self.plan(sample), rng, ref)

    def prompt(self, messages: Sequence[Message], plain: bool = False) -> EncodedSample:
        """A conversation that the model is to go on with: it ends with the generation prompt, and
        nothing is trained.

        Args:
            messages: the turns so far.
            plain: without the chat template, as captions are trained: the contents after one start
                token, to be gone on with where they end.

        Raises:
            DataError: for media that do not decode, or more tokens than the LLM has positions.
            ValueError: as :meth:`plan`.
        """
        sample = Sample(tuple(messages))
        self._check_modalities(sample)
        if plain:
            ids, trained = self._renderer.plain(messages, eos=False)
        else:
            ids, trained = self._renderer.chat(messages, generation_prompt=True)
        planned = replace(self._expand(ids, trained, sample), targets=())
        remedy = "leave earlier messages out, or begin a new conversation (/reset in mmfusion chat)"
        self._check.length(len(planned), "the conversation", remedy)
        return self.finish(sample, planned)

    def fingerprint(self) -> str:
        """Changes with whatever changes ids, slot counts or media: tokenizer, chat template, media
        processors, projectors, the decoder of JPEG.
        """
        parts = {
            "tokenizer": json.loads(self.tokenizer.backend_tokenizer.to_str()),
            "special": {
                name: str(token) for name, token in self.tokenizer.special_tokens_map.items()
            },
            "template": self.tokenizer.chat_template,
            "placeholders": self.placeholder_ids,
            "media": {name: settings_of(processor) for name, processor in self.media.items()},
            "num_tokens": {name: _slot_counts(f) for name, f in self._num_tokens.items()},
        }
        if self.targets:
            parts["targets"] = {name: settings_of(target) for name, target in self.targets.items()}
            parts["signals"] = self.signal_ids
        if self.speech_ids:
            parts["speech"] = self.speech_ids
        if (decoder := jpeg_decoder()) != "simplejpeg":
            parts["jpeg"] = decoder
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _check_modalities(self, sample: Sample) -> None:
        if not self.speech_ids and any(
            isinstance(part, Text) and part.spoken
            for message in sample.messages
            if message.role == "assistant"
            for part in message.content
        ):
            raise ValueError(
                "answers hold words to be said aloud, but the model has no voice; add "
                "`model.speaker`, or leave the source out."
            )
        if missing := {item.modality for item in sample.targets} - set(self.targets):
            raise ValueError(
                f"answers hold {sorted(missing)}, but the model has generators for "
                f"{sorted(self.targets)}; add `model.generators`, `model.output_projectors` and "
                "`model.signal_tokens` for them, or leave the source out."
            )
        if missing := {item.modality for item in sample.media} - set(self.media):
            raise ValueError(
                f"the data hold {sorted(missing)}, but the model has encoders for "
                f"{sorted(self.media)}; add `model.encoders` and `model.input_projectors` for "
                "them, or leave the source out."
            )

    def _expand(self, ids: Sequence[int], trained: Sequence[bool], sample: Sample) -> PlannedSample:
        """Repeat each placeholder for the slots of its media item; find the signal tokens."""
        self._check.ids(ids)
        items = sample.media
        modality_of = {index: modality for modality, index in self.placeholder_ids.items()}
        found = [modality_of[index] for index in ids if index in modality_of]
        if found != (expected := [item.modality for item in items]):
            raise ValueError(
                f"the chat template shows the media {found}, but the messages hold {expected} in "
                "this order; use a template that shows every message's text once."
            )
        todo, slots = iter(items), []
        all_ids: list[int] = []
        all_trained: list[bool] = []
        for index, mark in zip(ids, trained, strict=True):
            repeat = 1
            if index in modality_of:
                slots.append(self._slots(next(todo), len(all_ids)))
                repeat, mark = slots[-1].num_tokens, False
            all_ids += [index] * repeat
            all_trained += [mark] * repeat
        if all_trained:
            all_trained[0] = False
        return PlannedSample(
            torch.tensor(all_ids, dtype=torch.int64),
            torch.tensor(all_trained, dtype=torch.bool),
            tuple(slots),
            self._signal_slots(all_ids, sample.targets),
        )

    def _signal_slots(self, ids: list[int], targets: Sequence[Media]) -> tuple[SignalSlots, ...]:
        """Where the signal tokens of each target are."""
        firsts = {signals[0]: modality for modality, signals in self.signal_ids.items()}
        found = []
        for place, index in enumerate(ids):
            if modality := firsts.get(index):
                signals = self.signal_ids[modality]
                if ids[place : place + len(signals)] != signals:
                    raise ValueError(
                        f"the {len(signals)} signal tokens of {modality} do not follow one another "
                        f"in {ids[place : place + len(signals)]}; the tokenizer or its chat "
                        "template puts something between them."
                    )
                found.append(SignalSlots(modality, len(signals), place))
        if [slots.modality for slots in found] != (expected := [x.modality for x in targets]):
            raise ValueError(
                f"the chat template shows signal tokens of {[s.modality for s in found]}, but the "
                f"answers hold {expected} in this order; use a template that shows every message's "
                "text once."
            )
        return tuple(found)

    def _slots(self, media: Media, start: int) -> MediaSlots:
        num_features = int(self.media[media.modality].num_features(media))
        num_tokens = int(self._num_tokens[media.modality](num_features))
        if num_features < 1 or num_tokens < 1:
            raise DataError(
                f"empty_{media.modality}",
                f"{media.modality} gives {num_features} features and {num_tokens} tokens; expected "
                "at least one of each. It is too short or too small for this encoder.",
            )
        self._check.item(num_tokens, media.modality)
        return MediaSlots(media.modality, num_features, num_tokens, start)


def check_answers(messages: Sequence[Message]) -> None:
    """Assistant turns hold text or media.

    Raises:
        DataError: ``nothing_trained``, ``empty_text``.
    """
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise DataError(
            "nothing_trained",
            f"the sample has the roles {[message.role for message in messages]} and no assistant "
            "message, so there is nothing to train.",
        )
    for answer in answers:
        if any(isinstance(part, Media) for part in answer.content):
            continue
        if not "".join(part.text for part in answer.content if isinstance(part, Text)).strip():
            raise DataError("empty_text", "an assistant message has no text; expected some.")


def _check_count(item: MediaTensors, slots: MediaSlots) -> None:
    decoded = item.get("num_features")
    if decoded is not None and int(decoded) != slots.num_features:
        raise DataError(
            "count_mismatch",
            f"{slots.modality} decodes to {int(decoded)} features, but its header promised "
            f"{slots.num_features}; the file is truncated or its header is wrong.",
        )


def settings_of(processor: MediaProcessor) -> dict[str, Any]:
    """Class and settings of a media processor, as JSON."""
    kind = type(processor)
    settings = {name: _plain(value) for name, value in sorted(vars(processor).items())}
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **settings}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _slot_counts(num_tokens: Callable[[int], int]) -> list[int]:
    """The slots of some usual feature counts: enough to tell two projectors apart. -1 where the
    projector refuses the count.
    """
    counts = []
    for features in (1, 2, 5, 10, 49, 50, 64, 196, 256, 257, 576, 729, 1500):
        try:
            counts.append(int(num_tokens(features)))
        except ValueError:
            counts.append(-1)
    return counts
