"""From signal states to conditioning: shapes, layers, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmfusion.models.output_projectors.base import OutputProjector
from mmfusion.models.output_projectors.mlp import MLP, Linear
from mmfusion.models.output_projectors.query_decoder import QueryDecoder
from mmfusion.types import ConditioningSpec

SMALL = {"dim": 16, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "ffn_dim": 24}
SPECS = {
    "clip": ConditioningSpec(77, 24),
    "clap": ConditioningSpec(1, 10),
    "sdxl": ConditioningSpec(7, 24, pooled_dim=9),
}


def states(layers: tuple[int, ...] = (-1,), count: int = 3) -> dict[int, torch.Tensor]:
    torch.manual_seed(1)
    return {layer: torch.randn(count, 4, 8) for layer in layers}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("kind", [QueryDecoder, MLP, Linear])
def test_conditioning_has_the_generators_shape_and_reaches_every_weight(
    kind: Any, spec: ConditioningSpec
) -> None:
    projector = kind(8, spec, **(SMALL if kind is QueryDecoder else {}))
    found = projector(states(), torch.zeros(3, 4, 8))
    tokens = spec.tokens if kind is QueryDecoder or spec.tokens == 1 else 4
    assert found.tokens.shape == (3, tokens, spec.dim)
    total = found.tokens.square().sum()
    if spec.pooled_dim:
        assert found.pooled.shape == (3, spec.pooled_dim)
        total = total + found.pooled.square().sum()
    else:
        assert found.pooled is None
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())


@pytest.mark.parametrize("kind", [QueryDecoder, MLP])
def test_a_target_is_projected_alone_as_among_others(kind: Any) -> None:
    projector = kind(8, SPECS["sdxl"], **(SMALL if kind is QueryDecoder else {})).eval()
    together = projector(states(), torch.zeros(3, 4, 8))
    alone = projector({-1: states()[-1][1:2]}, torch.zeros(1, 4, 8))
    torch.testing.assert_close(alone.tokens[0], together.tokens[1])
    torch.testing.assert_close(alone.pooled[0], together.pooled[1])


@pytest.mark.parametrize("kind", [QueryDecoder, MLP, Linear])
def test_mixed_precision_does_not_round_what_a_projector_makes(kind: Any) -> None:
    """In bf16 the small part of the states that tells one caption from another would be lost."""
    projector = kind(8, SPECS["clap"], **(SMALL if kind is QueryDecoder else {})).eval()
    given = {-1: states()[-1].bfloat16()}
    full = projector(given, torch.zeros(3, 4, 8))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = projector(given, torch.zeros(3, 4, 8))
    assert mixed.tokens.dtype == torch.float32
    torch.testing.assert_close(mixed.tokens, full.tokens, rtol=0, atol=0)


def test_a_linear_projector_is_a_matrix() -> None:
    projector = Linear(8, ConditioningSpec(5, 6))
    given = states()
    expected = given[-1] @ projector.outward.weight.T + projector.outward.bias
    torch.testing.assert_close(projector(given, torch.zeros(3, 4, 8)).tokens, expected)


def test_a_mix_of_layers_starts_at_their_mean_and_learns() -> None:
    projector = Linear(8, ConditioningSpec(5, 6), layers=(0, 2, -1))
    given = states((0, 2, -1))
    mean = torch.stack([*given.values()]).mean(0)
    found = projector(given, torch.zeros(3, 4, 8)).tokens
    torch.testing.assert_close(found, projector.outward(mean))
    found.square().sum().backward()
    assert projector.mix.grad.abs().sum() > 0
    assert all(p.ndim for p in projector.parameters())  # DeepSpeed takes no others
    with torch.no_grad():
        projector.mix.copy_(torch.tensor([0.0, 50.0, 0.0]))
        projector.scale.fill_(2.0)
    found = projector(given, torch.zeros(3, 4, 8)).tokens
    torch.testing.assert_close(found, projector.outward(2 * given[2]))


def test_embeddings_are_added_where_asked() -> None:
    embeds = torch.randn(3, 4, 8)
    projector = Linear(8, ConditioningSpec(5, 6), add_embeddings=True)
    found = projector(states(), embeds).tokens
    torch.testing.assert_close(found, projector.outward(states()[-1] + embeds))


def test_queries_of_the_tiny_transformer_differ_from_the_start() -> None:
    """NExT-GPT's scripts initialise them with a deviation of 0: all tokens would be the same."""
    projector: OutputProjector = QueryDecoder(8, SPECS["clip"], **SMALL)
    found = projector(states(count=1), torch.zeros(1, 4, 8)).tokens[0]
    assert torch.pdist(found).min() > 1e-4


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one or more, each once"):
        Linear(8, SPECS["clip"], layers=())
    with pytest.raises(ValueError, match="expected one or more, each once"):
        Linear(8, SPECS["clip"], layers=(-1, -1))
    with pytest.raises(ValueError, match="no multiple of heads"):
        QueryDecoder(8, SPECS["clip"], dim=10, heads=4)
    with pytest.raises(ValueError, match="at least 1 linear layer"):
        MLP(8, SPECS["clip"], depth=0)
    with pytest.raises(ValueError, match="activation 'x' is unknown"):
        MLP(8, SPECS["clip"], activation="x")
