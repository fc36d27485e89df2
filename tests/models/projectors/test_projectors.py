"""Linear, MLP and LearnedTokens: their tokens are what num_tokens says, padding changes nothing."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from jsonargparse import ArgumentParser
from torch.nn import functional as F

from mmfusion.models.projectors.base import Projector
from mmfusion.models.projectors.learned_tokens import LearnedTokens
from mmfusion.models.projectors.linear import Linear
from mmfusion.models.projectors.mlp import MLP

FACTORIES = {
    "linear": Linear,
    "linear_stack": partial(Linear, stack=3, norm=True),
    "mlp": MLP,
    "mlp_deep": partial(MLP, depth=3, activation="silu", hidden_dim=7, stack=2, norm=True),
    "learned": partial(LearnedTokens, like=partial(Linear, stack=2)),
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_valid_tokens_do_not_depend_on_padding(name: str, count: int) -> None:
    torch.manual_seed(0)
    projector = FACTORIES[name](6, 5)
    features = torch.randn(1, count, 6)
    alone = projector(features, torch.ones(1, count, dtype=torch.bool))
    assert alone.shape == (1, projector.num_tokens(count), 5)
    padded = F.pad(features, (0, 0, 0, 4), value=100.0)
    mask = torch.arange(count + 4)[None] < count
    torch.testing.assert_close(projector(padded, mask)[:, : alone.shape[1]], alone)


def test_mlp_is_linear_gelu_linear() -> None:
    mlp = MLP(6, 5)
    first, _, second = mlp.layers
    x = torch.randn(2, 3, 6)
    found = mlp(x, torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(found, second(F.gelu(first(x))))
    assert [tuple(p.shape) for p in mlp.parameters()] == [(5, 6), (5,), (5, 5), (5,)]


def test_stacking_joins_neighbours_in_order() -> None:
    linear = Linear(2, 3, stack=2, bias=False)
    x = torch.arange(6.0).view(1, 3, 2)
    found = linear(x, torch.ones(1, 3, dtype=torch.bool))
    rows = torch.tensor([[0.0, 1, 2, 3], [4, 5, 0, 0]])
    torch.testing.assert_close(found[0], rows @ linear.linear.weight.T)


def test_learned_tokens_refuse_items_that_are_too_long() -> None:
    projector = LearnedTokens(6, 5, max_tokens=3)
    assert projector.num_tokens(3) == 3
    with pytest.raises(ValueError, match="LearnedTokens has 3; raise max_tokens"):
        projector.num_tokens(4)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MLP(2, 2, depth=0), "depth is 0"),
        (lambda: MLP(2, 2, activation="gleu"), "'gleu' is unknown"),
        (lambda: Linear(2, 2, stack=0), "stack is 0"),
    ],
)
def test_wrong_options_are_refused(make: Callable[[], Projector], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_a_recipe_declares_projectors_without_widths() -> None:
    parser = ArgumentParser()
    parser.add_argument("--p", type=dict[str, Callable[[int, int], Projector]])
    module = "mmfusion.models.projectors"
    mlp = {"class_path": f"{module}.mlp.MLP", "init_args": {"stack": 4}}
    learned = {"class_path": f"{module}.learned_tokens.LearnedTokens", "init_args": {"like": mlp}}
    config = parser.parse_object({"p": {"image": mlp, "audio": learned}})
    made = {name: make(6, 5) for name, make in parser.instantiate_classes(config).p.items()}
    assert isinstance(made["audio"], LearnedTokens)
    assert made["image"].num_tokens(9) == made["audio"].num_tokens(9) == 3


@pytest.mark.parametrize("like", [None, lambda a, b: MLP(a, b, stack=4)])
def test_learned_tokens_count_the_same_in_a_spawned_loader(like) -> None:
    tokens = LearnedTokens(8, 8, like=like)
    counts = [tokens.num_tokens(n) for n in (1, 4, 9)]
    again = pickle.loads(pickle.dumps(tokens))  # noqa: S301, as a spawned loader does
    assert [again.num_tokens(n) for n in (1, 4, 9)] == counts == ([1, 4, 9], [1, 1, 3])[bool(like)]
