"""The whole forward pass, on tiny models loaded from disk."""

from __future__ import annotations

from pathlib import Path

import torch

from mmfusion.models.projectors.linear import Linear
from mmfusion.models.projectors.mlp import MLP
from mmfusion.objectives.next_token import NextToken
from tests.models.tiny import make_batch, tiny_model

PROJECTORS = {"image": MLP, "audio": lambda i, o: Linear(i, o, stack=3)}
SAMPLES = [
    [("image", b"\1\2\3"), 5, 6, 7, ("audio", b"\1\2\3\4")],  # media at both borders of the pack
    [("audio", b"\7"), 8, 9, ("image", b"\4\5"), ("image", b"\6"), 10, 11],
    [12, 13, 14],
    [("image", b"\1\1\1\1"), 5, 6, 8],
]


def test_packed_loss_equals_the_losses_of_the_samples_alone(tmp_path: Path) -> None:
    model, objective = tiny_model(tmp_path, PROJECTORS), NextToken()
    packed = make_batch(model, SAMPLES)
    together = objective(model, model(packed), packed)
    assert together.count == 3 + 4 + 2 + 3
    for index, sample in enumerate(SAMPLES):
        batch = make_batch(model, [sample])
        alone = objective(model, model(batch), batch)
        torch.testing.assert_close(together.per_sample[index], alone.total, atol=1e-5, rtol=1e-5)
        assert together.per_sample_count[index] == alone.count
    torch.testing.assert_close(together.per_sample.sum(), together.total)


def test_padded_rows_give_the_packed_loss_and_gradients(tmp_path: Path) -> None:
    model, objective = tiny_model(tmp_path, PROJECTORS), NextToken()
    gradients = []
    for packed in (True, False):
        batch = make_batch(model, SAMPLES, packed)
        model.zero_grad()
        loss = objective(model, model(batch), batch)
        loss.total.backward()
        gradients.append([loss.total, *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
