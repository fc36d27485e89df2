"""A sample as a question: its encoding up to the last answer, and the true answer as text.

Cut from the very ids that training uses, so it fits captions and conversations alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mmfusion.types import EncodedSample, PlannedSample


@dataclass(frozen=True)
class Question:
    """What is asked, and what is right.

    Attributes:
        prompt: the sample up to its last answer, ready to be continued.
        text: the prompt as text; placeholders once an item.
        truth: the last answer as text.
        wanted: modalities of the media in the last answer, in reading order.
        spoken: whether words of the last answer are said aloud.
    """

    prompt: EncodedSample
    text: str
    truth: str
    wanted: tuple[str, ...] = ()
    spoken: bool = False


def as_question(
    sample: EncodedSample, tokenizer: Any, speech_ids: tuple[int, int] | None = None
) -> Question:
    """Cut a sample before the last run of trained tokens.

    Args:
        sample: with an answer.
        tokenizer: of the LLM.
        speech_ids: of the signal tokens around what is said aloud, where there are such.

    Raises:
        ValueError: where nothing is trained.
    """
    planned = sample.planned
    trained = planned.trained.nonzero().flatten().tolist()
    if not trained:
        raise ValueError(f"sample {sample.key!r} of {sample.shard!r} has no trained token.")
    end = trained[-1] + 1
    start = end - 1
    while start and planned.trained[start - 1]:
        start -= 1
    answer = planned.input_ids[start:end]
    kept = sum(slots.start < start for slots in planned.media)
    prompt = PlannedSample(
        planned.input_ids[:start], planned.trained[:start] & False, planned.media[:kept]
    )
    return Question(
        prompt=replace(
            sample, planned=prompt, tensors=sample.tensors[:kept], targets=(), captions=()
        ),
        text=tokenizer.decode(_without_repeats(prompt)),
        truth=tokenizer.decode(answer, skip_special_tokens=True).strip(),
        wanted=tuple(slots.modality for slots in planned.targets if slots.start >= start),
        spoken=speech_ids is not None and speech_ids[0] in answer.tolist(),
    )


def _without_repeats(planned: PlannedSample) -> list[int]:
    """The ids with one placeholder an item."""
    repeats = {
        place
        for slots in planned.media
        for place in range(slots.start + 1, slots.start + slots.num_tokens)
    }
    return [i for place, i in enumerate(planned.input_ids.tolist()) if place not in repeats]
