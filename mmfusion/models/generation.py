"""Continue prompts: a batch of encoded prompts to new token ids, with Hugging Face's ``generate``.

The prompts come as one packed batch; their embeddings, media in place, are laid out again as rows
padded on the left, which is exact: padding is masked, and positions start at each prompt's first
token. Sampling options, the key-value cache and stopping are Hugging Face's.

Legend: B prompts, T tokens of the longest, D hidden, S all tokens of the packed row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.generators.base import PARTS, Sampling
from mmfusion.processing.processor import Processor
from mmfusion.types import Batch, Conditioning, Media, Message, Sample, Text

MAX_MEDIA = 8
"""Of an answer: a model that repeats itself would else draw until its tokens are used up."""


@torch.no_grad()
def generate(
    model: AnyToAnyModel, prompts: Batch, max_media: int = MAX_MEDIA, **options: Any
) -> Tensor:
    """Continue every prompt of a packed batch.

    Args:
        model: built; in eval mode.
        prompts: one row of B prompts, ``cu_seqlens`` set.
        max_media: runs of signal tokens in a row, after which none begins.
        options: of ``transformers.GenerationMixin.generate`` (``max_new_tokens``, ``do_sample``,
            ``temperature``, ``streamer``, ...). ``max_new_tokens`` ends where learned positions do.
            A run of signal tokens that began within it is completed beyond it.

    Returns:
        (B, N) new ids; a row that stopped early is filled with the pad token.
    """
    backbone: Any = getattr(model.llm, "model", None)
    if not hasattr(backbone, "generate"):
        raise TypeError(
            f"{type(model.llm).__name__} cannot generate: expected a transformers model with "
            "`generate` in its `model` attribute."
        )
    embeds, mask = pad_left(model.embed(prompts)[0], prompts.cu_seqlens)
    room = model.llm.limits().room(embeds.shape[1])
    if room is not None and (asked := options.get("max_new_tokens")):
        options["max_new_tokens"] = min(asked, room)
    end = end_token_ids(model)
    if signals := list(model.processor().signal_ids.values()):
        # After the caller's own, which might let a signal token stand alone.
        given = options.get("logits_processor") or []
        options["logits_processor"] = LogitsProcessorList(
            [*given, WholeRuns(signals, room, max_media)]
        )
        if (asked := options.get("max_new_tokens") or 0) > 0:
            rest = max(map(len, signals)) - 1
            options["max_new_tokens"] = asked + rest if room is None else min(asked + rest, room)
            given = options.get("stopping_criteria") or []
            options["stopping_criteria"] = StoppingCriteriaList([*given, _Enough(asked, signals)])
    # Layers compiled for training would be compiled anew for every state of the cache.
    with torch.compiler.set_stance("force_eager"):
        return backbone.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            eos_token_id=end,
            pad_token_id=_pad_token_id(model.processor().tokenizer, end),
            **options,
        )


class WholeRuns(LogitsProcessor):
    """Once the first signal token of a modality is chosen, the others follow; none is chosen alone.

    Args:
        signals: ids of the signal tokens of each modality.
        room: longest answer that the LLM has positions for: a run that would not fit does not
            begin. None: there is no longest.
        most: runs in a row of ids.
    """

    def __init__(
        self, signals: Sequence[Sequence[int]], room: int | None = None, most: int = MAX_MEDIA
    ) -> None:
        self._after = {a: b for run in signals for a, b in pairwise(run)}
        self._later = [index for run in signals for index in run[1:]]
        self._lengths = {run[0]: len(run) for run in signals}
        self._room = math.inf if room is None else room
        self._firsts, self._most = torch.tensor([run[0] for run in signals]), most

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        forced = [self._after.get(int(row[-1])) if len(row) else None for row in input_ids]
        left = self._room - input_ids.shape[1]
        scores[:, self._later] = -torch.inf
        scores[:, [i for i, length in self._lengths.items() if length > left]] = -torch.inf
        begun = torch.isin(input_ids, self._firsts.to(input_ids.device)).sum(1)
        for row, index in enumerate(forced):
            if begun[row] >= self._most:
                scores[row, self._firsts] = -torch.inf
            if index is not None:
                scores[row] = -torch.inf
                scores[row, index] = 0.0
        return scores


class _Enough(StoppingCriteria):
    """Ends a row that is as long as was asked for, but not within a run of signal tokens.

    Args:
        asked: tokens.
        signals: ids of the signal tokens of each modality.
    """

    def __init__(self, asked: int, signals: Sequence[Sequence[int]]) -> None:
        self._asked, self._within = asked, {index for run in signals for index in run[:-1]}

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if input_ids.shape[1] < self._asked:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        ended = [int(index) not in self._within for index in input_ids[:, -1]]
        return torch.tensor(ended, device=input_ids.device)


@dataclass(frozen=True)
class Run:
    """Signal tokens in an answer, and what the generator is to make of them.

    Attributes:
        row: of the batch of answers.
        start, end: places in the row's new ids.
        modality: of the medium.
    """

    row: int
    start: int
    end: int
    modality: str


def find_runs(ids: Tensor, signal_ids: Mapping[str, Sequence[int]]) -> list[Run]:
    """The whole runs of signal tokens in (B, N) new ids, row by row; a run that was cut is none."""
    firsts = {run[0]: (modality, list(run)) for modality, run in signal_ids.items()}
    found = []
    for row, new in enumerate(ids.tolist()):
        for start, index in enumerate(new):
            modality, run = firsts.get(index, ("", []))
            if run and new[start : start + len(run)] == run:
                found.append(Run(row, start, start + len(run), modality))
    return found


def split_speech(ids: Tensor, speech_ids: tuple[int, int] | None) -> list[tuple[Tensor, bool]]:
    """(N,) new ids in pieces, with whether they are to be said aloud: those after the first signal
    token of speech, up to the second or the end.
    """
    if speech_ids is None:
        return [(ids, False)]
    pieces, begin, spoken = [], 0, False
    for place, index in enumerate([*ids.tolist(), None]):
        if index in speech_ids or index is None:
            pieces.append((ids[begin:place], spoken))
            begin, spoken = place + 1, index == speech_ids[0]
    return [(piece, aloud) for piece, aloud in pieces if len(piece)]


@torch.no_grad()
def conditioning_of(
    model: AnyToAnyModel, prompts: Batch, ids: Tensor, runs: Sequence[Run]
) -> dict[str, Conditioning]:
    """Conditioning of the runs of each modality, in their order: prompts and answers go through the
    LLM once more, as in training.

    Args:
        model: built; in eval mode.
        prompts: one packed row of B prompts.
        ids: (B, N) what they were gone on with.
        runs: of :func:`find_runs`, at least one.
    """
    assert prompts.cu_seqlens is not None
    given = model.embed(prompts)[0][0].split(prompts.cu_seqlens.diff().tolist())
    new = model.llm.embed(ids)
    rows = [torch.cat([before, after]) for before, after in zip(given, new, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    borders = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    places = torch.cat([torch.arange(int(length)) for length in lengths])[None].to(ids.device)
    embeds = torch.cat(rows)[None]
    states = model.llm.forward_layers(embeds, places, borders.int(), model.layers)
    found = {}
    for modality in dict.fromkeys(run.modality for run in runs):
        slots = torch.stack([
            torch.arange(run.start, run.end) + int(borders[run.row]) + len(given[run.row])
            for run in runs
            if run.modality == modality
        ])  # fmt: skip
        found[modality] = model.condition(modality, states, embeds, slots)
    return found


@torch.no_grad()
def make_media(
    model: AnyToAnyModel, prompts: Batch, ids: Tensor, runs: Sequence[Run], sampling: Sampling
) -> list[Media]:
    """The medium of each run; those of one modality are drawn together.

    Args:
        model: built; in eval mode. Parts of its generators that are missing are loaded.
        prompts: one packed row of B prompts.
        ids: (B, N) what they were gone on with.
        runs: of :func:`find_runs`.
        sampling: how media are drawn; of several seeds, each is of one run.
    """
    if not runs:
        return []
    made: dict[int, Media] = {}
    for modality, given in conditioning_of(model, prompts, ids, runs).items():
        model.need(modality, PARTS)
        generator = model.generator(modality).to(ids.device).eval()
        empty = generator.encode_empty()
        places = [i for i, run in enumerate(runs) if run.modality == modality]
        own = sampling
        if isinstance(sampling.seed, tuple):
            own = replace(sampling, seed=tuple(sampling.seed[i] for i in places))
        made |= zip(places, generator.sample(given, empty, own), strict=True)
    return [made[i] for i in range(len(runs))]


def pad_left(embeds_1SD: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lay a packed row out as (B, T, D) rows with zeros on the left.

    Returns:
        The rows and their (B, T) int64 mask, 1 on prompt tokens.
    """
    if cu_seqlens is None or len(embeds_1SD) != 1:
        raise ValueError(
            f"prompts come as rows of shape {tuple(embeds_1SD.shape[:2])}, "
            f"cu_seqlens {cu_seqlens is not None}; expected one packed row with cu_seqlens."
        )
    lengths = cu_seqlens.diff().tolist()
    longest = max(lengths)
    rows = embeds_1SD.new_zeros(len(lengths), longest, embeds_1SD.shape[-1])
    mask = torch.zeros(len(lengths), longest, dtype=torch.int64, device=embeds_1SD.device)
    for row, marks, prompt in zip(rows, mask, embeds_1SD[0].split(lengths), strict=True):
        row[longest - len(prompt) :] = prompt
        marks[longest - len(prompt) :] = 1
    return rows, mask


def end_token_ids(model: AnyToAnyModel) -> list[int]:
    """Tokens that end an answer: the tokenizer's and the generation configuration's, and the one
    that closes an assistant turn in training.
    """
    processor = model.processor()
    found = {processor.tokenizer.eos_token_id, _end_of_turn(processor)}
    config = getattr(getattr(model.llm, "model", None), "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    found.update(more if isinstance(more, list) else [more])
    return sorted(token for token in found if token is not None)


def _end_of_turn(processor: Processor) -> int | None:
    if not processor.tokenizer.chat_template:
        return None
    turns = (Message("user", (Text("a"),)), Message("assistant", (Text("b"),)))
    planned = processor.plan(Sample(turns))
    last = int(planned.input_ids[planned.trained][-1])
    return last if last in processor.tokenizer.all_special_ids else None


def _pad_token_id(tokenizer: Any, end: list[int]) -> int:
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return end[0] if end else 0
