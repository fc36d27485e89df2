"""How alike conditionings and text encodings are, against loops."""

from __future__ import annotations

import pytest
import torch

from mmfusion.models.generators.similarity import similarities
from mmfusion.types import Conditioning


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (sum(a**2) ** 0.5 * sum(b**2) ** 0.5))


def test_similarity_is_the_mean_cosine_of_valid_tokens_and_of_pooled_vectors() -> None:
    torch.manual_seed(0)
    ours = Conditioning(torch.randn(3, 4, 5), torch.randn(3, 6))
    mask = torch.arange(4) < torch.tensor([[4], [1]])
    texts = Conditioning(torch.randn(2, 4, 5), torch.randn(2, 6), mask)
    found = similarities(ours, texts)
    for m in range(3):
        for k, valid in enumerate((4, 1)):
            tokens = [cosine(ours.tokens[m, c], texts.tokens[k, c]) for c in range(valid)]
            pooled = cosine(ours.pooled[m], texts.pooled[k])
            assert float(found[m, k]) == pytest.approx((sum(tokens) / valid + pooled) / 2, abs=1e-6)


def test_what_is_zero_beyond_a_caption_is_not_compared() -> None:
    texts = Conditioning(torch.cat([torch.randn(3, 2, 8), torch.zeros(3, 6, 8)], 1))
    ours = Conditioning(
        texts.tokens + 5 * torch.cat([torch.zeros(3, 2, 8), torch.randn(3, 6, 8)], 1)
    )
    torch.testing.assert_close(similarities(ours, texts).diagonal(), torch.ones(3))


def test_of_one_unit_vector_it_is_the_scalar_product() -> None:
    ours, texts = (torch.nn.functional.normalize(torch.randn(n, 1, 8), dim=-1) for n in (2, 3))
    found = similarities(Conditioning(ours), Conditioning(texts))
    torch.testing.assert_close(found, ours[:, 0] @ texts[:, 0].T)


def test_low_precision_around_it_does_not_round_it() -> None:
    torch.manual_seed(0)
    ours, texts = (Conditioning(torch.randn(n, 4, 64)) for n in (2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        found = similarities(ours, texts)
    torch.testing.assert_close(found, similarities(ours, texts), rtol=0, atol=0)


def test_other_shapes_are_refused() -> None:
    ours, texts = Conditioning(torch.zeros(1, 3, 6)), Conditioning(torch.zeros(2, 4, 6))
    with pytest.raises(ValueError, match=r"of shape \(3, 6\), text encodings of \(4, 6\)"):
        similarities(ours, texts)
