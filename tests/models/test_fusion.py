"""Scatter against a loop, and the counts it refuses."""

from __future__ import annotations

import pytest
import torch

from mmfusion.models import fusion

IDS = torch.tensor([[1, 9, 9, 2], [9, 3, 8, 9]])  # 9 image, 8 audio


def test_scatter_writes_each_token_into_its_slot_and_gradients_flow() -> None:
    embeds = torch.randn(2, 4, 3, requires_grad=True)
    tokens = {name: torch.randn(n, 3, requires_grad=True) for name, n in (("image", 4), ("a", 1))}
    slots = {"image": torch.tensor([1, 2, 4, 7]), "a": torch.tensor([6])}
    fused = fusion.scatter(embeds, tokens, slots)
    expected = embeds.detach().clone()
    for name, places in slots.items():
        for token, place in zip(tokens[name], places.tolist(), strict=True):
            expected[place // 4, place % 4] = token.detach()
    assert torch.equal(fused, expected)
    fused.sum().backward()
    assert all((token.grad == 1).all() for token in tokens.values())
    text = (IDS < 8).float()[..., None].expand(2, 4, 3)
    assert torch.equal(embeds.grad, text)


def test_without_media_the_embeddings_stay() -> None:
    embeds, none = torch.randn(1, 4, 3), torch.zeros(0, dtype=torch.int64)
    assert fusion.scatter(embeds, {}, {}) is embeds
    assert fusion.scatter(embeds, {"image": torch.zeros(0, 3)}, {"image": none}) is embeds


def test_tokens_take_the_dtype_of_the_embeddings() -> None:
    embeds = torch.zeros(1, 2, 3, dtype=torch.bfloat16)
    fused = fusion.scatter(embeds, {"a": torch.ones(1, 3)}, {"a": torch.tensor([1])})
    assert fused.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("slots", "match"),
    [
        ([0], "image: 1 placeholder slots, 2 media tokens"),
        ([0, 1, 2], "3 placeholder slots, 2 media tokens"),
        ([0, 4], "slots reach from 0 to 4, the batch has 1 x 4"),
        ([-1, 2], "slots reach from -1"),
        ([2, 2], "claim the same placeholder slot"),
    ],
)
def test_slots_that_do_not_fit_are_refused(slots: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fusion.scatter(
            torch.zeros(1, 4, 3), {"image": torch.zeros(2, 3)}, {"image": torch.tensor(slots)}
        )


def test_two_modalities_may_not_share_a_slot() -> None:
    one = torch.zeros(1, 3)
    slot = torch.tensor([1])
    with pytest.raises(ValueError, match="claim the same"):
        fusion.scatter(torch.zeros(1, 4, 3), {"a": one, "b": one}, {"a": slot, "b": slot})


def test_valid_tokens_are_each_items_first_ones_in_order() -> None:
    tokens = torch.arange(6.0).view(2, 3, 1)
    assert fusion.valid_tokens(tokens, torch.tensor([2, 1]), "a").flatten().tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match="has 4 placeholder slots, the projector gave 3"):
        fusion.valid_tokens(tokens, torch.tensor([4, 1]), "a")
    with pytest.raises(ValueError, match="projected 2 items, the batch counts 1"):
        fusion.valid_tokens(tokens, torch.tensor([1]), "a")


@pytest.mark.parametrize("slots", [[1, 2, 4], [1, 2, 4, 6], [0, 1, 2, 4, 7], []])
def test_slots_must_be_the_placeholders(slots: list[int]) -> None:
    fusion.check_placeholders(IDS, torch.tensor([1, 2, 4, 7]), 9, "image")
    with pytest.raises(ValueError, match="image: 4 placeholder tokens in the text"):
        fusion.check_placeholders(IDS, torch.tensor(slots, dtype=torch.int64), 9, "image")
