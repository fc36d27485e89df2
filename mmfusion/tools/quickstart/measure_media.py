"""The figures of a run that answers with media, on what it was never trained on: requests in new
words, about held-out things.

What was made is judged by classifiers that saw true media only (:mod:`.judges`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfusion.data.order import key64
from mmfusion.data.source import Source
from mmfusion.inference import Answer, Chat, load
from mmfusion.models.generators.base import Sampling
from mmfusion.models.generators.noise import generators_of
from mmfusion.tools.quickstart.heldout import HeldOut, read_held_out, text_of
from mmfusion.tools.quickstart.intervals import Estimate, ratio
from mmfusion.tools.quickstart.judges import SmallJudge
from mmfusion.tools.quickstart.measure import (
    data_of,
    normal,
    of_source,
    right_captions,
    right_motions,
    right_shapes,
    with_memory,
)
from mmfusion.types import Conditioning, Media, SampleRef

Figures = dict[str, Any]
Rights = tuple[list[str], np.ndarray]
"""Concepts of some items, and how right each was."""

RIGHT_BOUNDS = {"image": 0.85, "audio": 0.75, "video": 0.75}
EMISSION_BOUND, GAIN_BOUND, DROP_BOUND = 0.95, 0.80, -0.02
SAMPLING = Sampling(steps=20, guidance_scale=3.0)
TOGETHER, NEW_TOKENS, NOISES = 16, 40, 4


@dataclass(frozen=True)
class Said:
    """A held-out request or question, and the answer to it."""

    item: HeldOut
    answer: Answer

    @property
    def about(self) -> str:
        """What is asked for: things with one caption are no independent tries."""
        return _truth(self.item).caption or "" if self.wanted else self.item.concept

    @property
    def wanted(self) -> str:
        """Modality of the true answer, empty for words."""
        return str(self.item.about.get("modality", ""))

    @property
    def made(self) -> list[Media]:
        """Media of the modality that was wanted."""
        return [medium for medium in self.answer.media if medium.modality == self.wanted]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        requests: the most of a modality, and questions that words answer.
        questions: about shapes, to the runs before and after.
        captions: samples of a data set, for both.
    """

    requests: int
    questions: int
    captions: int


def measure_media(
    run: Path, stages: Mapping[str, Path], judges: Mapping[str, SmallJudge], sizes: Sizes
) -> tuple[Figures, list[Said]]:
    """All figures of the run, and what it said.

    Args:
        run: that answers with media.
        stages: ``stage 1``, whose held-out captions are asked for, and ``before``, the
            understanding run that this one began from.
        judges: one for each modality, built.
        sizes: how much is measured.
    """
    data, chat, limit = data_of(run), load(run), sizes.requests
    print("   requests in new words, and questions that words answer", flush=True)
    asked = _of_kind(data.val_sources, "requests", limit)
    in_words = read_held_out(data.val_sources["words"], limit)
    in_words += [_first_turn(item) for item in read_held_out(data.val_sources["talks"], limit)]
    said = answers(chat, [*asked, *in_words])
    remade = answers(chat, _of_kind(data.val_sources, "remakes", limit // 2))
    print("   conditioning against the captions' own", flush=True)
    figures: Figures = {
        "right": right_figures(said, judges, RIGHT_BOUNDS),
        "remade": right_figures(remade, judges, {}),
        "judges": {name: judge_figure(judge, asked) for name, judge in judges.items()},
        "emission": emission_figure(said),
        "denoising": {name: denoising_figures(chat, asked, name) for name in chat.makes},
    }
    print("   understanding, before and after", flush=True)
    captions = data_of(stages["stage 1"]).val_sources
    found = {
        name: understanding(model, captions, data.val_sources["shapes"], sizes)
        for name, model in (("after", chat), ("before", load(stages["before"])))
    }
    figures["understanding"] = drop_figures(found["before"], found["after"])
    return figures, [*said, *remade]


def understanding(
    chat: Chat, captions: Mapping[str, Source], shapes: Source, sizes: Sizes
) -> dict[str, Rights]:
    """What the quickstart measures in per cent of a run that understands, item by item."""
    found = {"shapes": right_shapes(chat, shapes, sizes.questions)}
    chat = with_memory(chat)
    pictures = of_source(read_held_out(captions["pictures"], sizes.captions), "stamps")
    if pictures:
        concepts = [item.concept for item in pictures]
        found["stamps"] = concepts, right_captions(chat, pictures)
    clips = read_held_out(captions["motions"], sizes.captions)
    found["motions"] = [item.concept for item in clips], right_motions(chat, clips)
    return found


def _of_kind(sources: Mapping[str, Source], kind: str, limit: int) -> list[HeldOut]:
    """The first of each source that is named so: ``picture_requests``, ``clip_requests``."""
    names = [name for name in sources if name.endswith(f"_{kind}")]
    return [item for name in names for item in read_held_out(sources[name], limit)]


def _first_turn(item: HeldOut) -> HeldOut:
    return replace(item, sample=replace(item.sample, messages=item.sample.messages[:2]))


def answers(chat: Chat, items: Sequence[HeldOut]) -> list[Said]:
    """Greedy answers to the first turns, each with media drawn from its own seed."""
    found: list[Said] = []
    for start in range(0, len(items), TOGETHER):
        group = items[start : start + TOGETHER]
        prompts: Any = [list(item.sample.messages[:1]) for item in group]
        sampling = replace(SAMPLING, seed=start)
        said = chat.generate(prompts, max_new_tokens=NEW_TOKENS, sampling=sampling)
        found += [Said(item, answer) for item, answer in zip(group, said, strict=True)]
    return found


def right_figures(
    said: Sequence[Said], judges: Mapping[str, SmallJudge], bounds: Mapping[str, float]
) -> dict[str, Estimate]:
    """By modality, how often what was made shows what was asked for. No medium is not right,
    and neither is one that cannot be decoded.
    """
    figures = {}
    for modality in sorted({one.wanted for one in said} - {""}):
        group = [one for one in said if one.wanted == modality]
        right = np.zeros(len(group))
        made = [i for i, one in enumerate(group) if one.made]
        seen = judges[modality].told([group[i].made[0] for i in made]) if made else []
        for i, found in zip(made, seen, strict=True):
            right[i] = found == judges[modality].labels(_truth(group[i].item))
        names = [one.about for one in group]
        figures[modality] = ratio(right, np.ones(len(group)), names, bounds.get(modality))
    return figures


def _truth(item: HeldOut) -> Media:
    """The true medium, with its caption."""
    return item.sample.targets[0]


def judge_figure(judge: SmallJudge, asked: Sequence[HeldOut]) -> Estimate:
    """How often the judge is right about true media."""
    items = [item for item in asked if _truth(item).modality == judge.processor().modality]
    media = [_truth(item) for item in items]
    right = [seen == judge.labels(m) for seen, m in zip(judge.classify(media), media, strict=True)]
    return ratio(np.array(right, float), np.ones(len(items)), [m.caption or "" for m in media])


def emission_figure(said: Sequence[Said]) -> Estimate:
    """F1 of answering with the modality that is wanted, and with none where words are."""
    twice, total = np.zeros(len(said)), np.zeros(len(said))
    for i, one in enumerate(said):
        given = {medium.modality for medium in one.answer.media}
        wanted = {one.wanted} - {""}
        twice[i] = 2 * len(given & wanted)
        total[i] = len(given) + len(wanted)
    return ratio(twice, total, [one.about for one in said], EMISSION_BOUND)


@torch.no_grad()
def denoising_figures(chat: Chat, asked: Sequence[HeldOut], modality: str) -> dict[str, Estimate]:
    """Denoising losses under our conditioning, the caption's own and that of "", each with the same
    noise; and the share of the caption's gain over "" that ours has.
    """
    generator = chat.model.generator(modality)
    items = [item for item in asked if item.about["modality"] == modality]
    losses: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(items), TOGETHER):
        group = items[start : start + TOGETHER]
        encoded = [
            chat.processor.encode(item.sample, ref=SampleRef("requests", 0, start + i))
            for i, item in enumerate(group)
        ]
        batch = chat.batch(encoded)
        keys = list(range(start, start + len(group)))
        target = batch.targets[modality]
        latents = generator.encode_media(target.tensors, generators_of(keys, 1))
        caption = generator.encode_captions(target)
        empty = generator.encode_empty()
        given = {
            "ours": chat.model(batch).conditioning[modality],
            "caption": caption,
            "empty": Conditioning.cat([empty] * len(group)),
        }
        for name, conditioning in given.items():
            drawn = [
                generator.denoising_loss(latents, conditioning, [key64(k, n) for k in keys])
                for n in range(NOISES)
            ]
            losses[name] += torch.stack(drawn).mean(0).tolist()
    concepts = [_truth(item).caption or "" for item in items]
    found = {name: np.array(values) for name, values in losses.items()}
    ones = np.ones(len(items))
    ours, caption = found["empty"] - found["ours"], found["empty"] - found["caption"]
    gain = ratio(ours, caption, concepts, GAIN_BOUND)
    if ratio(caption, ones, concepts).low <= 0:  # of nothing there is no share
        gain = Estimate(0.0, 0.0, 0.0, GAIN_BOUND)
    return {**{name: ratio(values, ones, concepts) for name, values in found.items()}, "gain": gain}


def drop_figures(
    before: Mapping[str, Rights], after: Mapping[str, Rights]
) -> dict[str, dict[str, Estimate]]:
    """Shares before and after, and the differences on the same items."""
    figures = {}
    for name, (concepts, old) in before.items():
        new, ones = after[name][1], np.ones(len(old))
        figures[name] = {
            "before": ratio(old, ones, concepts),
            "after": ratio(new, ones, concepts),
            "change": ratio(new - old, ones, concepts, DROP_BOUND),
        }
    return figures


def words_of(one: Said) -> tuple[str, str]:
    """What was asked and what was said, without media."""
    return text_of(one.item.sample.messages[0]), normal(one.answer)
