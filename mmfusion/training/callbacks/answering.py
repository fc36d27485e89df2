"""Answers of a validation: what the model says and makes of some samples of each source, beside
what is right.

Which samples are asked, and the noise of what is made, follow from the source alone; ranks divide
them among themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import lightning as L
from torch import Tensor
from torchmetrics.text import SQuAD

from mmfusion.data.collate import collate
from mmfusion.data.datamodule import data_of
from mmfusion.data.order import key64
from mmfusion.data.packing import Item
from mmfusion.data.reader import Budget, Reader
from mmfusion.data.source import Source
from mmfusion.data.validation import spread
from mmfusion.metrics.answers import Question, as_question
from mmfusion.metrics.emission import SPEECH, Emission
from mmfusion.metrics.judges.base import Judge
from mmfusion.models.generation import Run, find_runs, generate, make_media, split_speech
from mmfusion.models.generators.base import Sampling
from mmfusion.processing.processor import Processor
from mmfusion.training.agreement import gather_to_first
from mmfusion.training.callbacks.table import Answered
from mmfusion.training.module import MultimodalModule
from mmfusion.types import Batch, DataError, EncodedSample, Media, SampleRef

T = TypeVar("T")


@dataclass(frozen=True)
class Asking:
    """How many samples of a source are asked, and how; see ``Validation``."""

    generate_samples: int
    table_samples: int
    media_samples: int
    max_new_tokens: int
    prompts_per_batch: int
    sampling: Sampling


@dataclass(frozen=True)
class Asked:
    """A sample that is asked.

    Attributes:
        ref: which it is.
        question: of it.
        shown: whether it goes into the table.
        drawn: whether media of its answer are made.
    """

    ref: SampleRef
    question: Question
    shown: bool
    drawn: bool


@dataclass(frozen=True)
class Reply:
    """The answer to a sample.

    Attributes:
        text: without special tokens.
        emitted: modalities of the media it holds, and ``speech`` where it is said aloud.
        made: those media, where they are made.
    """

    text: str
    emitted: frozenset[str]
    made: tuple[Media, ...] = ()


class Answering:
    """The answers of one validation.

    Args:
        trainer: that validates.
        module: what is validated.
        asking: how many samples, and how.
        judges: of made media, by modality.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: MultimodalModule,
        asking: Asking,
        judges: Mapping[str, Judge],
    ) -> None:
        self._trainer, self._module, self._asking = trainer, module, asking
        self._data = data_of(trainer)
        self._processor = cast(Processor, self._data.processor)
        self._judges = {name: judge.to(module.device) for name, judge in judges.items()}
        for judge in self._judges.values():
            judge.reset()
        speech = [SPEECH] if self._processor.speech_ids else []
        self._emission = Emission([*module.model.generators, *speech]).to(module.device)
        self._rows: list[tuple[int, int, Answered]] = []

    def figures(self) -> dict[str, float]:
        """Ask every source. Over all ranks, each of which must call it."""
        figures: dict[str, float] = {}
        for number, (name, source) in enumerate(self._data.val_sources.items()):
            figures |= self._ask(number, name, source, is_chat(source))
        if self._asking.generate_samples or self._asking.media_samples:
            emission = self._emission.compute()
            figures |= {f"emission/{name}": value for name, value in emission.items()}
        for modality, judge in self._judges.items():
            found = judge.compute()
            figures |= {f"judge/{modality}/{name}": value for name, value in found.items()}
        return figures

    def rows(self) -> list[Answered]:
        """What is shown of all ranks, source by source, on rank 0 alone, for rows hold whole media;
        each rank must call it.
        """
        rows = sorted(gather_to_first(self._rows), key=lambda row: row[:2])
        return [row for *_, row in rows]

    def _ask(self, number: int, name: str, source: Source, chat: bool) -> dict[str, float]:
        asking = self._asking
        counts = [asking.generate_samples, asking.media_samples] if chat else []
        places = spread(len(source), max([*counts, asking.table_samples]))
        shown, drawn = (
            {places[i] for i in spread(len(places), count)}
            for count in (asking.table_samples, asking.media_samples if chat else 0)
        )
        exact = SQuAD().to(self._module.device)
        mine = places[self._trainer.global_rank :: self._trainer.world_size]
        for group in _chunks(self._asked(name, mine, shown, drawn), asking.prompts_per_batch):
            replies = self._answer(group)
            for asked, reply in zip(group, replies, strict=True):
                key, truth = f"{name}/{asked.ref.index}", asked.question.truth
                if truth or not asked.question.wanted:  # a picture alone is no text to match
                    target = {"answers": {"answer_start": [0], "text": [truth]}, "id": key}
                    exact.update({"prediction_text": reply.text, "id": key}, target)
            self._look(number, group, replies)
            if chat:
                wanted = [_with_speech(q.wanted, q.spoken) for q in (a.question for a in group)]
                self._emission.update([reply.emitted for reply in replies], wanted)
        some = exact.update_called or self._trainer.world_size > 1
        if not (chat and asking.generate_samples and some):
            return {}
        scores = {what: float(score) for what, score in exact.compute().items()}
        # Where every true answer is media there is no text to match, on any rank.
        return {f"{what}/{name}": x for what, x in scores.items() if not math.isnan(x)}

    def _asked(
        self, name: str, indices: Sequence[int], shown: set[int], drawn: set[int]
    ) -> Iterator[Asked]:
        data = self._data
        budget = Budget(data.pack_tokens, data.pack_media)
        reader = Reader(data.val_sources, self._processor, 0, budget)
        for index in indices:
            ref = SampleRef(name, 0, index)
            item = reader.plan(ref)
            sample = reader.finish(item) if isinstance(item, Item) else item
            if isinstance(sample, EncodedSample):  # bad ones are reported with the losses
                processor = self._processor
                question = as_question(sample, processor.tokenizer, processor.speech_ids)
                yield Asked(ref, question, index in shown, index in drawn)

    def _answer(self, group: Sequence[Asked]) -> list[Reply]:
        """Greedy answers."""
        prompts = collate([asked.question.prompt for asked in group], self._processor)
        prompts = prompts.to(self._module.device)
        with precision(self._trainer):
            ids = generate(
                self._module.model,
                prompts,
                max_new_tokens=self._asking.max_new_tokens,
                do_sample=False,
            )
            runs = find_runs(ids, self._processor.signal_ids)
            made = self._make(group, prompts, ids, runs)
        texts = self._processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        spoken = self._spoken(ids)
        emitted = [
            _with_speech((run.modality for run in runs if run.row == row), aloud)
            for row, aloud in enumerate(spoken)
        ]
        return [Reply(t.strip(), e, m) for t, e, m in zip(texts, emitted, made, strict=True)]

    def _spoken(self, ids: Tensor) -> list[bool]:
        """Whether words are said aloud in each of (B, N) new ids."""
        decode, speech_ids = self._processor.tokenizer.decode, self._processor.speech_ids
        said = ([piece for piece, aloud in split_speech(row, speech_ids) if aloud] for row in ids)
        return [
            any(decode(piece, skip_special_tokens=True).strip() for piece in pieces)
            for pieces in said
        ]

    def _make(
        self, group: Sequence[Asked], prompts: Batch, ids: Tensor, runs: Sequence[Run]
    ) -> list[tuple[Media, ...]]:
        """Media of the answers that are drawn, each from noise of its own."""
        chosen = [run for run in runs if group[run.row].drawn]
        seeds = []
        for run in chosen:
            ref = group[run.row].ref
            parts = self._asking.sampling.seed, ref.source, ref.index, run.start
            seeds.append(key64("validation", *cast("tuple[int, str, int, int]", parts)) >> 1)
        sampling = replace(self._asking.sampling, seed=tuple(seeds))
        media = make_media(self._module.model, prompts, ids, chosen, sampling)
        pairs = list(zip(chosen, media, strict=True))
        return [tuple(m for run, m in pairs if run.row == row) for row in range(len(group))]

    def _look(self, number: int, group: Sequence[Asked], replies: Sequence[Reply]) -> None:
        """Judge what was made, and keep what is shown."""
        pairs: dict[str, list[tuple[Media, Media]]] = {name: [] for name in self._judges}
        for asked, reply in zip(group, replies, strict=True):
            if not (asked.shown or reply.made):
                continue
            ref, question = asked.ref, asked.question
            sample = self._data.val_sources[ref.source][ref.index]
            wanted = tuple(sample.targets[-len(question.wanted) :]) if question.wanted else ()
            for modality, found in pairs.items():
                made, true = (
                    [item for item in items if item.modality == modality]
                    for items in (reply.made, wanted)
                )
                # Of media that features took the place of, there is no truth to look at.
                found += [pair for pair in zip(made, true, strict=False) if pair[1].data]
            if asked.shown:
                given, said = tuple(sample.media), (question.text, reply.text, question.truth)
                aloud = SPEECH in reply.emitted, question.spoken
                undrawn = tuple(sorted(reply.emitted - {SPEECH, *(m.modality for m in reply.made)}))
                row = Answered(ref.source, given, *said, reply.made, wanted, *aloud, undrawn)
                self._rows.append((number, ref.index, row))
        for modality, found in pairs.items():
            if found:
                self._judges[modality].update([m for m, _ in found], [true for _, true in found])


def is_chat(source: Source) -> bool:
    """Whether a source holds conversations: its first sample that can be read tells."""
    for index in range(len(source)):
        try:
            return source[index].format == "chat"
        except DataError:
            continue
    return False


def _with_speech(modalities: Iterable[str], spoken: bool) -> frozenset[str]:
    return frozenset([*modalities, *([SPEECH] if spoken else [])])


def precision(trainer: L.Trainer) -> AbstractContextManager:
    """In which the trainer's precision holds."""
    return trainer.precision_plugin.forward_context()


def _chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
