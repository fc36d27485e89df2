"""A trained run, ready to use: ``mmfusion.load(run_dir)`` gives a :class:`Chat` that answers
conversations with media and scores given answers.

The model is rebuilt from the run's ``config.yaml`` and its checkpoint; prompts go through the same
:class:`mmfusion.processing.processor.Processor` as training data.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, TextIteratorStreamer

from mmfusion.data.collate import collate
from mmfusion.generate_options import (
    Left,
    StopAt,
    before,
    check_length,
    check_options,
    given,
    seeded,
)
from mmfusion.messages import Conversation, conversation
from mmfusion.models import quantised
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.bfloat16 import HALF, computes_bfloat16
from mmfusion.models.generation import (
    MAX_MEDIA,
    Run,
    find_runs,
    generate,
    make_media,
    split_speech,
)
from mmfusion.models.generators.base import Sampling, check_seed
from mmfusion.objectives.next_token import NextToken
from mmfusion.training.rebuild import load_module
from mmfusion.types import Batch, EncodedSample, Media, Sample, SampleRef, Text


def load(
    run_dir: str | Path,
    step: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Chat:
    """Rebuild a run's model.

    Args:
        run_dir: a run directory.
        step: the checkpoint of this step; None takes the newest complete one.
        device: where to run; None takes a GPU where there is one.
        dtype: of all weights and statistics; None keeps the recipe's, but for half precision on a
            CPU that has no instructions for it: fp32 there. Positions stay in fp32.

    Raises:
        FileNotFoundError: where there is no such run or checkpoint.
    """
    model = load_module(run_dir, step).model
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        _to_precision(model, dtype, () if computes_bfloat16(device) else HALF)
        return Chat(quantised.move(model, device))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {error}") from error


def _to_precision(
    model: AnyToAnyModel, dtype: torch.dtype | None, slow: Sequence[torch.dtype]
) -> None:
    """All weights to ``dtype``; without one, those of a slow precision to fp32."""

    def wanted(kept: torch.dtype) -> torch.dtype:
        return dtype or (torch.float32 if kept in slow else kept)

    state = model.state_dict(keep_vars=True)  # without the rotary frequencies
    held = {*model.parameters(), *model.buffers()}  # without the scales of quantised weights
    for tensor in state.values():
        if tensor in held and tensor.is_floating_point() and not quantised.is_quantised(tensor):
            tensor.data = tensor.data.to(wanted(tensor.dtype))
    quantised.change_precision(model, wanted)
    for modality in model.generators:  # what is built of them when media are made
        generator = model.generator(modality)
        generator.dtype = wanted(generator.dtype)


class Answer(str):
    """An answer: the text of it, with its parts.

    Attributes:
        parts: text and media in their order.
    """

    parts: tuple[Text | Media, ...]

    def __new__(cls, parts: Sequence[Text | Media]) -> Answer:
        """Of parts in their order."""
        texts = [part.text for part in parts if isinstance(part, Text)]
        answer = super().__new__(cls, " ".join(texts))
        answer.parts = tuple(parts)
        return answer

    def __getnewargs__(self) -> tuple[Any]:
        """What a copy is made from; str's own would be taken for the parts."""
        return (self.parts,)

    @property
    def media(self) -> list[Media]:
        """Media that were made, and what was said."""
        found = [part if isinstance(part, Media) else part.sound for part in self.parts]
        return [media for media in found if media is not None]


class Chat:
    """A model and its processor, for use.

    Args:
        model: built and loaded; put into eval mode.

    Attributes:
        speaker: says answers aloud; the recipe's, or any other.
    """

    def __init__(self, model: AnyToAnyModel) -> None:
        self.model = model.eval()
        self.processor = model.processor()
        self.speaker = model.speaker

    @property
    def modalities(self) -> list[str]:
        """Kinds of media the model takes."""
        return list(self.processor.media)

    @property
    def makes(self) -> list[str]:
        """Kinds of media the model makes."""
        return list(self.processor.targets)

    @overload
    def generate(
        self, messages: Conversation, *, stream: Literal[True], **options: Any
    ) -> Generator[str | Media, None, Answer]: ...
    @overload
    def generate(
        self, messages: Conversation, *, stream: Literal[False] = False, **options: Any
    ) -> Answer: ...
    @overload
    def generate(
        self,
        messages: Sequence[Conversation],
        *,
        stream: Literal[False] = False,
        **options: Any,
    ) -> list[Answer]: ...
    def generate(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        stream: bool = False,
        plain: bool = False,
        stop: str | None = None,
        max_new_tokens: int = 256,
        max_media: int = MAX_MEDIA,
        do_sample: bool = False,
        seed: int | None = None,
        sampling: Sampling | None = None,
        speak: bool = False,
        **options: Any,
    ) -> Answer | list[Answer] | Generator[str | Media, None, Answer]:
        """Answer one conversation or a batch of them.

        Args:
            messages: a text; or messages (:class:`mmfusion.types.Message`, or dicts of ``role`` and
                ``content``, which is a text or a list of texts, media and dicts such as
                ``{"type": "image", "path": ...}`` or ``{"type": "text", "text": ...}``); or a list
                of conversations, answered together.
            stream: give pieces of text as they come (one conversation only).
            plain: without the chat template, as captions are trained: go on with the text and media
                of the messages, e.g. ``[picture, "Image caption:"]``.
            stop: a text at which the answer ends, e.g. the line break after a caption.
            max_new_tokens: longest answer; it ends earlier where the LLM has no more positions. The
                rest of a run of signal tokens, which stands for media, does not count.
            max_media: most media of an answer.
            do_sample: draw tokens instead of taking the likeliest.
            seed: of the draws; None uses torch's global generator.
            sampling: how media are drawn: steps, guidance scale, seed. Of several seeds each is of
                one conversation, whose k-th medium draws from it + k.
            speak: say all the text of the answer aloud, not just what the model wants said.
            options: what else a ``GenerationConfig`` of Hugging Face takes (``temperature``,
                ``top_p``, ``top_k``, ``repetition_penalty``, ``num_beams``, ...), and
                ``logits_processor``, ``stopping_criteria`` and ``prefix_allowed_tokens_fn``. Not
                what would give other than one answer, and nothing of ours under another name:
                ``guidance_scale`` belongs to ``sampling``.

        Returns:
            The answer, a list of them for a batch, or an iterator over pieces of it: first the text
            as it comes, then the media; the iterator's return value is the whole answer. An answer
            is a text, with its ``parts`` in order.

        Raises:
            FileNotFoundError: a media path that is not there.
            ValueError: media the model has no encoder for, messages of another shape, options it
                does not take, ``speak`` without a speaker, a ``sampling`` that a generator cannot
                do.
            mmfusion.types.DataError: media that do not decode, more tokens than the LLM has
                positions.
        """
        check_options(options)
        check_length(max_new_tokens, stop)
        if seed is not None:
            check_seed("seed", seed)
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise ValueError(
                f"sampling is {sampling!r}; expected a Sampling(steps=..., guidance_scale=..., "
                "seed=...) of mmfusion.models.generators.base."
            )
        for modality in self.makes:
            self.model.generator(modality).check(sampling)
        batch = _is_batch(messages)
        if batch and stream:
            raise ValueError("stream=True answers one conversation; got a batch of them.")
        if speak and self.speaker is None:
            raise ValueError(
                "there is no voice to speak with; give the recipe a `model.speaker`, set `speaker` "
                "of this object, or start mmfusion chat with --speaker."
            )
        conversations = cast("Sequence[Conversation]", messages if batch else [messages])
        if isinstance(sampling.seed, tuple) and len(sampling.seed) != len(conversations):
            raise ValueError(
                f"sampling.seed names {len(sampling.seed)} seeds for {len(conversations)} "
                "conversations; expected one for each of them, or one number for all."
            )
        encoded = [self.processor.prompt(conversation(c), plain) for c in conversations]
        prompts = self.batch(encoded)
        options = {
            "max_new_tokens": max_new_tokens,
            "max_media": max_media,
            "do_sample": do_sample,
            **given(options),
        }
        criteria = StoppingCriteriaList(options.get("stopping_criteria", ()))
        if stop:
            criteria.append(StopAt(stop, self.processor.tokenizer))
        options["stopping_criteria"] = criteria
        if stream:
            return self._stream(prompts, seed, sampling, speak, stop, options)
        with seeded(seed):
            ids = generate(self.model, prompts, **options)
        answers = self._answers(prompts, ids, sampling, speak, stop)
        return answers if batch else answers[0]

    def _answers(
        self, prompts: Batch, ids: Tensor, sampling: Sampling, speak: bool, stop: str | None
    ) -> list[Answer]:
        """Text between the runs of signal tokens, what the generators make of those, and what is
        said.
        """
        runs = find_runs(ids, self.processor.signal_ids)
        media = iter(make_media(self.model, prompts, ids, runs, _drawn_by(sampling, runs)))
        parts: list[list[Text | Media]] = [[] for _ in ids]
        for row, new in enumerate(ids):
            begin = 0
            for run in [run for run in runs if run.row == row]:
                parts[row] += [*self._text(new[begin : run.start], stop), next(media)]
                begin = run.end
            parts[row] += self._text(new[begin:], stop)
        seeds = (sampling.seed,) * len(ids) if isinstance(sampling.seed, int) else sampling.seed
        return [
            Answer([self._said(part, speak, seed) for part in found])
            for found, seed in zip(parts, seeds, strict=True)
        ]

    def _text(self, ids: Tensor, stop: str | None) -> list[Text]:
        found = []
        for piece, spoken in split_speech(ids, self.processor.speech_ids):
            text = self.processor.tokenizer.decode(piece, skip_special_tokens=True)
            text = (text.partition(stop)[0] if stop else text).strip()
            found += [Text(text, spoken)] if text else []
        return found

    def _said(self, part: Text | Media, speak: bool, seed: int) -> Text | Media:
        """With its sound, where it is to be said."""
        if isinstance(part, Media) or self.speaker is None or not (part.spoken or speak):
            return part
        return replace(part, sound=self.speaker.say(part.text, seed))

    def _stream(
        self,
        prompts: Batch,
        seed: int | None,
        sampling: Sampling,
        speak: bool,
        stop: str | None,
        options: dict[str, Any],
    ) -> Generator[str | Media, None, Answer]:
        """Pieces of the answer; leaving the iterator early stops the model."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_special_tokens=True)
        left = Left()
        options["stopping_criteria"].append(left)
        errors: list[BaseException] = []
        found: list[Tensor] = []

        def work() -> None:
            try:
                with seeded(seed):
                    found.append(generate(self.model, prompts, streamer=streamer, **options))
            except BaseException as error:  # handed to the consumer below
                errors.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from before(stop, streamer)
        finally:
            left.now = True
            thread.join()
        if errors:
            raise errors[0]
        (answer,) = self._answers(prompts, found[0], sampling, speak, stop)
        yield from answer.media
        return answer

    @torch.no_grad()
    def score(
        self, samples: Sequence[Sample], tokens_per_batch: int = 4096
    ) -> tuple[Tensor, Tensor]:
        """How likely the given answers are: the loss of each sample's trained tokens.

        Samples are packed into rows of up to ``tokens_per_batch`` tokens, shortest first.

        Returns:
            (S,) float64 sums of the loss in nats and (S,) int64 numbers of trained tokens, in the
            order of ``samples``.
        """
        objective = NextToken()
        planned = [self.processor.plan(sample) for sample in samples]
        sums = torch.zeros(len(samples), dtype=torch.float64)
        counts = torch.zeros(len(samples), dtype=torch.int64)
        for group in _groups([len(plan) for plan in planned], tokens_per_batch):
            batch = self.batch(
                [self.processor.finish(samples[index], planned[index]) for index in group]
            )
            loss = objective(self.model, self.model(batch), batch)
            sums[group] = loss.per_sample.double().cpu()
            counts[group] = loss.per_sample_count.cpu()
        return sums, counts

    def batch(self, encoded: Sequence[EncodedSample]) -> Batch:
        """One packed row on the model's device, media in the encoders' dtype."""
        device = next(self.model.parameters()).device
        named = [replace(one, ref=SampleRef("", 0, index)) for index, one in enumerate(encoded)]
        batch: Batch = collate(named, self.processor).to(device)
        for modality, media in batch.media.items():
            floats = (p for p in self.model.encoders[modality].parameters())
            dtype = next((p.dtype for p in floats if p.is_floating_point()), torch.float32)
            media.tensors = {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for name, tensor in media.tensors.items()
            }
        return batch


def _drawn_by(sampling: Sampling, runs: Sequence[Run]) -> Sampling:
    """A seed for each medium, where there is one for each conversation."""
    if isinstance(sampling.seed, int):
        return sampling
    made: Counter[int] = Counter()
    seeds = []
    for run in runs:
        seeds.append(sampling.seed[run.row] + made[run.row])
        made[run.row] += 1
    return replace(sampling, seed=tuple(seeds))


def _is_batch(messages: Any) -> bool:
    """A batch is a list of conversations: of texts or of lists."""
    return (
        isinstance(messages, Sequence)
        and not isinstance(messages, (str, bytes))
        and len(messages) > 0
        and isinstance(messages[0], (str, list, tuple))
    )


def _groups(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices by length, cut into groups whose lengths add up to at most ``budget``."""
    group: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and total + lengths[index] > budget:
            yield group
            group, total = [], 0
        group.append(index)
        total += lengths[index]
    if group:
        yield group
