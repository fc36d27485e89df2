"""Targets beside all captions of a validation, in bounded memory, against a loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mmfusion.models.generators.similarity import similarities
from mmfusion.training.callbacks import caption_retrieval
from mmfusion.training.callbacks.caption_retrieval import CaptionRetrieval
from mmfusion.types import Conditioning, ConditioningSpec, TargetBatch

SPEC = ConditioningSpec(4, 6, 5)
COUNT, CAPTIONS = 90, 70  # more than are compared at a time
CAPTION_OF = [i % (CAPTIONS + 1) for i in range(COUNT)]  # the last has none
KEYS = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0)).tolist()


def encoding(number: int, noise: float = 0.0) -> Conditioning:
    draw = torch.Generator().manual_seed(number)
    tokens, pooled = torch.randn(1, 4, 6, generator=draw), torch.randn(1, 5, generator=draw)
    other = torch.Generator().manual_seed(number + 1000)
    tokens = 1e5 * (tokens + noise * torch.randn(1, 4, 6, generator=other))  # no half of it
    return Conditioning(tokens, pooled, torch.arange(4)[None] < 2 + number % 3)


def ours_of(i: int) -> Conditioning:
    return encoding(CAPTION_OF[i], noise=2.0 + i / COUNT)


def said(number: int) -> str:
    return f"c{number:02d}" if number < CAPTIONS else " "


def found_in(batches: Sequence[Sequence[int]]) -> tuple[CaptionRetrieval, dict[str, float]]:
    retrieval = CaptionRetrieval(SPEC, torch.device("cpu"))
    for batch in batches:
        none: Any = None
        captions = [said(CAPTION_OF[i]) for i in batch]
        target = TargetBatch({}, none, none, torch.tensor([KEYS[i] for i in batch]), captions)
        ours = Conditioning.cat([ours_of(i) for i in batch])
        texts = Conditioning.cat([encoding(CAPTION_OF[i]) for i in batch])
        retrieval.add(target, ours, texts)
    return retrieval, retrieval.figures()


def expected(targets: Sequence[int]) -> dict[str, float]:
    targets = [i for i in targets if CAPTION_OF[i] < CAPTIONS]
    captions = sorted({CAPTION_OF[i] for i in targets})
    cosines, places = [], []
    for i in targets:
        near = {k: float(similarities(ours_of(i), encoding(k))) for k in captions}
        cosines.append(near[CAPTION_OF[i]])
        places.append(sorted(captions, key=lambda k: -near[k]).index(CAPTION_OF[i]))
    shares = {f"retrieval@{k}": sum(p < k for p in places) / len(places) for k in (1, 5)}
    cosine = pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
    return {"cosine": cosine, **shares, "captions": len(captions)}


ORDERS = [[range(COUNT)], [[i] for i in reversed(range(COUNT))]]


@pytest.mark.slow
@pytest.mark.parametrize("batches", ORDERS, ids=["one", "many"])
def test_each_target_is_compared_with_all_captions(batches: Sequence[Sequence[int]]) -> None:
    _, figures = found_in(batches)
    assert figures == expected(range(COUNT))
    assert 0.1 < figures["retrieval@1"] < figures["retrieval@5"] < 1


def test_in_mixed_precision_the_figures_are_the_same() -> None:
    _, found = found_in([range(COUNT)])
    with torch.autocast("cpu", torch.bfloat16):
        _, mixed = found_in([range(COUNT)])
    assert mixed == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("batches", ORDERS, ids=["one", "many"])
@pytest.mark.parametrize("bound", [{"MOST": 20}, {"MOST_BYTES": 20 * 4 * (4 * 6 + 5)}])
def test_of_many_targets_those_with_the_smallest_keys_count(
    batches: Sequence[Sequence[int]], bound: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in bound.items():
        monkeypatch.setattr(caption_retrieval, name, value)
    retrieval, figures = found_in(batches)
    captioned = [i for i in range(COUNT) if CAPTION_OF[i] < CAPTIONS]
    assert figures == expected(sorted(captioned, key=lambda i: KEYS[i])[:20])
    held = [*retrieval._texts.values(), *(kept.ours for kept in retrieval._kept)]
    tensors = [x for one in held for x in (one.tokens, one.pooled)]
    assert sum(x.untyped_storage().nbytes() for x in tensors) <= 20 * 4 * (4 * 6 + 5)


def test_without_captions_there_is_nothing() -> None:
    assert found_in([[CAPTIONS]])[1] == {}
    assert CaptionRetrieval(SPEC, torch.device("cpu")).figures() == {}
