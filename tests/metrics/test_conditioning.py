"""Cosine, retrieval and the denoising gain, against loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfusion.metrics.conditioning import CaptionMatch, DenoisingLosses
from mmfusion.models.generators.similarity import similarities
from mmfusion.types import Conditioning

CAPTIONS = [f"c{i}" for i in range(40)]


def encoding(caption: str) -> tuple[Tensor, Tensor]:
    number = int(caption[1:])
    tokens = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
    return tokens, torch.arange(4) < 2 + number % 3


def encode(captions: Sequence[str]) -> Conditioning:
    tokens, masks = zip(*map(encoding, captions), strict=True)
    return Conditioning(torch.stack(tokens), mask=torch.stack(masks))


def conditionings(noise: float, own: Sequence[int]) -> Tensor:
    draw = torch.Generator().manual_seed(99)
    return torch.stack([
        encoding(CAPTIONS[k])[0] * 3 + noise * torch.randn(4, 6, generator=draw) for k in own
    ])  # fmt: skip


def similar(tokens: Tensor) -> Tensor:
    return similarities(Conditioning(tokens), encode(CAPTIONS))


def figures(tokens: Tensor, own: Sequence[int]) -> dict[str, float]:
    match = CaptionMatch()
    match.update(similar(tokens), torch.tensor(own))
    return match.compute()


def test_cosine_and_retrieval_equal_loops() -> None:
    own = [i % 40 for i in range(50)]
    tokens = conditionings(4.0, own)
    cosines, first, among_five = [], 0, 0
    for ours, k in zip(tokens, own, strict=True):
        near = []
        for caption in CAPTIONS:
            wanted, mask = encoding(caption)
            near.append(float(F.cosine_similarity(ours, wanted, dim=-1)[mask].mean()))
        place = sorted(range(40), key=lambda i: -near[i]).index(k)
        cosines.append(near[k])
        first, among_five = first + (place == 0), among_five + (place < 5)
    found = figures(tokens, own)
    assert found["cosine"] == pytest.approx(sum(cosines) / 50, abs=1e-6)
    assert found["retrieval@1"] == pytest.approx(first / 50)
    assert found["retrieval@5"] == pytest.approx(among_five / 50)
    assert 0.1 < found["retrieval@1"] < found["retrieval@5"] < 1


def test_the_captions_own_encoding_is_found_and_what_is_the_same_for_all_is_not() -> None:
    own = list(range(40))
    exact = figures(conditionings(0.0, own), own)
    assert exact == {"cosine": pytest.approx(1), "retrieval@1": 1.0, "retrieval@5": 1.0}
    same = figures(torch.ones(40, 4, 6), own)
    assert same["retrieval@1"] == pytest.approx(1 / 40)
    assert figures(torch.zeros(40, 4, 6), own)["retrieval@5"] == 0.0  # all alike: ties are lost


def test_a_conditioning_that_is_not_a_number_is_not_found() -> None:
    found = figures(torch.full((3, 4, 6), math.nan), [0, 1, 2])
    assert math.isnan(found["cosine"])
    assert found["retrieval@5"] == 0.0


def test_parts_add_up_and_nothing_gives_nothing() -> None:
    own = [0, 3, 3, 7, 9]
    tokens = conditionings(3.0, own)
    parts = CaptionMatch()
    for part in (slice(0, 2), slice(2, 2), slice(2, 5)):
        parts.update(similar(tokens[part]), torch.tensor(own[part]))
    assert parts.compute() == pytest.approx(figures(tokens, own))
    assert CaptionMatch().compute() == {}


def test_the_gain_is_the_share_of_what_the_caption_gains() -> None:
    losses = DenoisingLosses()
    assert losses.compute() == {}
    losses.update(torch.tensor([[0.5, 0.7], [0.3, 0.5], [0.9, 1.1]]))
    losses.update(torch.tensor([[0.9], [0.7], [1.3]]))
    found = losses.compute()
    assert found == {
        "ours": pytest.approx(0.7),
        "caption": pytest.approx(0.5),
        "empty": pytest.approx(1.1),
        "gain": pytest.approx(0.4 / 0.6),
    }
    deaf = DenoisingLosses()
    deaf.update(torch.tensor([[0.5], [0.6], [0.6005]]))
    assert "gain" not in deaf.compute()  # a generator that hardly listens to its own captions
