"""The quickstart's figures, on samples whose concepts never occur in training.

A caption's loss per token is measured with the right media, with those of strangers (another
caption of the same source), with blank ones, and under a *separately trained* model that sees
learned constants in place of media. Only the last is a fair baseline: wrong and blank media mislead
a model that was trained to trust them.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfusion.data.datamodule import MultimodalData
from mmfusion.data.source import Source
from mmfusion.inference import Chat, load
from mmfusion.tools.quickstart.heldout import (
    HeldOut,
    alone,
    blank,
    read_held_out,
    strangers,
    text_of,
    with_media,
)
from mmfusion.tools.quickstart.intervals import Estimate, ratio
from mmfusion.tools.quickstart.pictures import MOTIONS
from mmfusion.training.rebuild import from_recipe
from mmfusion.types import MediaTensors, Message, Sample, Text

STRANGERS = 3
OPTIONS = 8
PROMPTS_PER_BATCH, TOKENS_PER_BATCH = 32, 1024
BOUNDS = {"pictures": (0.3, 0.6), "speech": (0.4, 1.0), "motions": (0.3, 0.3)}
"""Nats a token by which the right media must beat the no-media run, and strangers' media."""

CHOICES = 20
CHOICE_BOUNDS = {"stamps": 0.45, "clipart": None}
"""Sources whose captions are chosen among, and the share of right choices to reach."""

SHAPES_BOUND = 0.80

Figures = dict[str, Any]


def measure_captions(run: Path, no_media: Path | None, limit: int | None) -> Figures:
    """What each modality is worth to stage 1's model.

    Args:
        run: run directory of stage 1.
        no_media: run directory of the same stage with learned constants in place of media.
        limit: the most samples of a data set.

    Returns:
        For each data set its losses, gains and choices.
    """
    sources = data_of(run).val_sources
    chat = with_memory(load(run))
    constant = load(no_media) if no_media else None
    figures = {}
    for name, bounds in BOUNDS.items():
        items = read_held_out(sources[name], limit)
        _tell(f"{name}: losses under right, blank and strangers' media")
        figures[name] = caption_figures(chat, constant, items, *bounds)
        figures[name]["choice"] = choice_figures(chat, items)
        if name == "motions":
            _tell(f"{name}: which of {len(MOTIONS)} is preferred")
            figures[name]["motion choice"] = motion_figures(chat, items)
    return figures


def measure_answers(run: Path, questions: int) -> Figures:
    """How stage 3's model answers questions about shapes."""
    data = data_of(run)
    _tell(f"shapes: answers to {questions} questions")
    return shape_figures(load(run), data.val_sources["shapes"], data.sources["shapes"], questions)


def _tell(part: str) -> None:
    """What is measured next: all of it takes minutes."""
    print(f"   {part}", flush=True)


def data_of(run: Path) -> MultimodalData:
    """The data of a run's recipe."""
    return from_recipe(str(run / "config.yaml"))[1]


def with_memory(chat: Chat) -> Chat:
    """Let the frozen encoders remember what they encoded: every item is measured several times."""
    for encoder in chat.model.encoders.values():
        encoder.forward = _remembering(encoder.forward)  # type: ignore[method-assign]
    return chat


def _remembering(forward: Callable[[MediaTensors], Tensor]) -> Callable[[MediaTensors], Tensor]:
    known: dict[bytes, Tensor] = {}

    def remembered(tensors: MediaTensors) -> Tensor:
        count = len(next(iter(tensors.values())))
        keys = [
            _digest({name: tensor[n] for name, tensor in tensors.items()}) for n in range(count)
        ]
        new = [n for n, key in enumerate(keys) if key not in known]
        if new:
            features = forward({name: tensor[new] for name, tensor in tensors.items()})
            known.update(zip((keys[n] for n in new), features, strict=True))
        return torch.nn.utils.rnn.pad_sequence([known[key] for key in keys], batch_first=True)

    return remembered


def _digest(tensors: MediaTensors) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def caption_figures(
    chat: Chat, no_media: Chat | None, items: Sequence[HeldOut], over_none: float, over_wrong: float
) -> Figures:
    """Loss per caption token under each kind of media, and what the right ones are worth."""
    others = strangers(items, STRANGERS)
    pairs = [(index, other) for index, found in enumerate(others) for other in found]
    samples = [item.sample for item in items]
    concepts = [item.concept for item in items]
    right, tokens = _scores(chat, samples)
    blanks, _ = _scores(chat, [with_media(s, [blank(m) for m in s.media]) for s in samples])
    sums, _ = _scores(chat, [with_media(samples[i], samples[o].media) for i, o in pairs])
    rows = np.array([i for i, _ in pairs], dtype=np.int64)
    found = np.bincount(rows, minlength=len(items))
    wrong = np.bincount(rows, weights=sums, minlength=len(items)) / np.maximum(found, 1)
    losses = {"right": right, "blank": blanks}
    gains = {"over blank": ratio(blanks - right, tokens, concepts)}
    if no_media is not None:
        constant, _ = _scores(no_media, samples)
        losses["no-media run"] = constant
        gains["over no-media run"] = ratio(constant - right, tokens, concepts, over_none)
    figures: Figures = {
        "samples": len(items),
        "concepts": len(set(concepts)),
        "tokens": int(tokens.sum()),
        "loss": {name: ratio(loss, tokens, concepts) for name, loss in losses.items()},
        "gain": gains,
        "gain by source": _by_source(items, {n: v - right for n, v in losses.items()}, tokens),
    }
    if (known := found > 0).any():  # a source may hold one concept only
        keep = np.flatnonzero(known)
        names = [concepts[i] for i in keep]
        figures["loss"]["strangers"] = ratio(wrong[keep], tokens[keep], names)
        gain = ratio((wrong - right)[keep], tokens[keep], names, over_wrong)
        figures["gain"]["over strangers"] = gain
    return figures


def _by_source(
    items: Sequence[HeldOut], terms: dict[str, np.ndarray], counts: np.ndarray
) -> dict[str, dict[str, Estimate]]:
    """Every figure of its own for each source of the items."""
    groups = defaultdict(list)
    for index, item in enumerate(items):
        groups[item.about["source"]].append(index)
    return {
        source: {
            name: ratio(term[index], counts[index], [items[i].concept for i in index])
            for name, term in terms.items()
            if name != "right"
        }
        for source, index in sorted(groups.items())
    }


def choice_figures(chat: Chat, items: Sequence[HeldOut]) -> dict[str, Estimate]:
    """How often the right one of ``OPTIONS`` captions is preferred, by source."""
    figures = {}
    for source, bound in CHOICE_BOUNDS.items():
        group = of_source(items, source)
        if not group:
            continue
        _tell(f"{source}: which of {OPTIONS} captions is preferred")
        concepts = [item.concept for item in group]
        figures[source] = ratio(right_captions(chat, group), np.ones(len(group)), concepts, bound)
    return figures


def of_source(items: Sequence[HeldOut], source: str) -> list[HeldOut]:
    """Those of a source; none where it has too few captions to choose among."""
    group = [item for item in items if item.about["source"] == source]
    return group if len({item.concept for item in group}) >= OPTIONS else []


def right_captions(chat: Chat, items: Sequence[HeldOut]) -> np.ndarray:
    """(S,) how often the right one of ``OPTIONS`` captions is preferred, of ``CHOICES`` draws of
    wrong ones.

    A caption's score is its loss under these media minus its mean loss under media of all other
    concepts: what is likely anyway is not preferred for it.
    """
    scores = _scores_over_others(chat, items)
    right = np.zeros(len(items))
    for draw in range(CHOICES):
        for index, others in enumerate(strangers(items, OPTIONS - 1, draw)):
            right[index] += scores[index, index] < scores[others, index].min()
    return right / CHOICES


def _scores_over_others(chat: Chat, items: Sequence[HeldOut]) -> np.ndarray:
    """(S, S): the loss of caption a under the media of b, minus its mean under other concepts'."""
    sums, _ = _scores(chat, [with_media(a.sample, b.sample.media) for a in items for b in items])
    losses = sums.reshape(len(items), len(items))
    concepts = np.array([item.concept for item in items])
    other = concepts[:, None] != concepts
    return losses - np.where(other, losses, 0).sum(1, keepdims=True) / other.sum(1, keepdims=True)


def motion_figures(chat: Chat, items: Sequence[HeldOut]) -> Estimate:
    """How often the right one of all motions is the likeliest."""
    concepts = [item.concept for item in items]
    return ratio(right_motions(chat, items), np.ones(len(items)), concepts)


def right_motions(chat: Chat, items: Sequence[HeldOut]) -> np.ndarray:
    """(S,) 1 where the right one of all motions is the likeliest, the caption else the same."""
    names = sorted(MOTIONS)
    flat = []
    for item in items:
        *before, last = item.sample.messages
        for motion in names:
            changed = tuple(
                Text(part.text.replace(MOTIONS[item.about["motion"]], MOTIONS[motion]))
                if isinstance(part, Text)
                else part
                for part in last.content
            )
            flat.append(replace(item.sample, messages=(*before, Message(last.role, changed))))
    sums, tokens = _scores(chat, flat)
    best = (sums / tokens).reshape(len(items), len(names)).argmin(1)
    right = [names[b] == item.about["motion"] for b, item in zip(best, items, strict=True)]
    return np.array(right, float)


def shape_figures(chat: Chat, source: Source, train: Source, questions: int) -> Figures:
    """Exact match on questions about shapes, each asked alone, and what guessing reaches.

    ``question only`` answers every question with its most frequent answer in training: the best
    that a model can do which does not see the picture.
    """
    asked = list(alone(read_held_out(source)))[:questions]
    truths = [normal(truth) for _, _, truth in asked]
    said = short_answers(chat, [sample for _, sample, _ in asked])
    guesses: dict[str, Counter[str]] = defaultdict(Counter)
    for _, sample, truth in alone(read_held_out(train)):
        guesses[text_of(sample.messages[0])][normal(truth)] += 1
    majority = sum(guesses.values(), Counter[str]()).most_common(1)[0][0]
    by_question = [
        guesses[text_of(sample.messages[0])].most_common(1)[0][0]
        if guesses[text_of(sample.messages[0])]
        else majority
        for _, sample, _ in asked
    ]
    clusters = [item.concept for item, _, _ in asked]

    def share(answers: Sequence[str], bound: float | None = None) -> Estimate:
        right = [normal(a) == t for a, t in zip(answers, truths, strict=True)]
        return ratio(np.array(right, float), np.ones(len(right)), clusters, bound)

    return {
        "questions": len(asked),
        "pictures": len(set(clusters)),
        "exact match": share(said, SHAPES_BOUND),
        "question only": share(by_question),
        "majority": share([majority] * len(asked)),
    }


def short_answers(chat: Chat, samples: Sequence[Sample]) -> list[str]:
    """A few words to each conversation."""
    prompts = [list(sample.messages) for sample in samples]
    return [
        answer
        for start in range(0, len(prompts), PROMPTS_PER_BATCH)
        for answer in chat.generate(prompts[start:][:PROMPTS_PER_BATCH], max_new_tokens=6)
    ]


def right_shapes(chat: Chat, source: Source, questions: int) -> tuple[list[str], np.ndarray]:
    """Concepts of the questions about shapes, and 1 for each that is answered right."""
    asked = list(alone(read_held_out(source)))[:questions]
    said = short_answers(chat, [sample for _, sample, _ in asked])
    right = [normal(a) == normal(truth) for a, (_, _, truth) in zip(said, asked, strict=True)]
    return [item.concept for item, _, _ in asked], np.array(right, float)


def normal(answer: str) -> str:
    """An answer as it is compared: lower case, without a final full stop."""
    return answer.strip().rstrip(".").lower()


def _scores(chat: Chat, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """(S,) losses in nats and (S,) trained tokens."""
    sums, counts = chat.score(samples, TOKENS_PER_BATCH)
    return sums.numpy(), counts.numpy()
