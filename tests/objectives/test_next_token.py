"""The chunked loss against plain cross entropy on all logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfusion import tuning
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.projectors.mlp import MLP
from mmfusion.objectives.next_token import NextToken, chunked_cross_entropy
from mmfusion.tuning import Full, LoRA, NewTokens
from mmfusion.types import IGNORE_INDEX, Batch
from tests.models.tiny import make_batch, save_llm, tiny_model

SAMPLES = [[("image", b"\1\2"), 5, 6, 7], [8, 9, 10, 11, 12], [("image", b"\4"), 13]]


def plain(model: AnyToAnyModel, batch: Batch) -> Tensor:
    """Cross entropy on every logit of the row; a label is predicted one place before."""
    logits = model.llm.logits(model(batch).hidden_states).float()
    shifted = F.pad(batch.labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum")


def values_and_gradients(model: AnyToAnyModel, total: Tensor) -> list[Tensor]:
    model.zero_grad()
    (3.0 * total).backward()  # what is above must reach every gradient
    return [total.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 1024])
@pytest.mark.parametrize(
    "policies",
    [
        {"input_projectors": Full(1e-3)},
        {"input_projectors": Full(1e-3), "llm": Full(1e-3)},
        {"llm": LoRA(1e-3, r=2, targets=["lm_head", "q_proj"])},
        {"llm": [LoRA(1e-3, r=2), NewTokens(1e-3)]},
    ],
    ids=["frozen_head", "trained_head", "lora_in_head", "new_rows_in_head"],
)
def test_loss_and_gradients_equal_plain_cross_entropy(
    tmp_path: Path, policies: dict[str, Any], chunk: int, tied: bool
) -> None:
    save_llm(tmp_path, tie_word_embeddings=tied)
    model = tiny_model(tmp_path, {"image": MLP}, new_tokens=["[A]"])
    assert model.llm.new_token_ids == [40]
    tuning.apply(model, policies)
    batch = make_batch(model, [*SAMPLES, [14, 40]])
    objective = NextToken(chunk=chunk)
    loss = objective(model, model(batch), batch)
    assert loss.count == 3 + 4 + 1 + 1
    assert loss.total.dtype == torch.float32
    found = values_and_gradients(model, loss.total)
    expected = values_and_gradients(model, plain(model, batch))
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().clamp(min=1)
        torch.testing.assert_close(ours / scale, theirs / scale, atol=1e-5, rtol=1e-5)


def test_sums_of_each_sample_add_up(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    batch = make_batch(model, SAMPLES)
    loss = NextToken(chunk=2)(model, model(batch), batch)
    assert loss.per_sample_count.tolist() == [3, 4, 1]
    for index in range(3):
        labels = batch.labels.masked_fill(batch.segment_ids != index, IGNORE_INDEX)
        alone = plain(model, replace(batch, labels=labels))
        torch.testing.assert_close(loss.per_sample[index], alone)
    assert not loss.per_sample.requires_grad


def test_bf16_autocast_trains_a_full_head(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    tuning.apply(model, {"llm": Full(1e-3)})
    batch = make_batch(model, SAMPLES)
    with torch.autocast("cpu", torch.bfloat16):
        loss = NextToken(chunk=2)(model, model(batch), batch)
        reference = plain(model, batch)
    assert loss.total.dtype == torch.float32
    found = values_and_gradients(model, loss.total)
    expected = values_and_gradients(model, reference)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-2, atol=0)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.dtype == torch.float32
        similar = F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
        assert similar > 0.98 or theirs.abs().max() < 1e-3


def test_without_targets_the_loss_is_zero_with_a_graph(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    tuning.apply(model, {"input_projectors": Full(1e-3), "llm": Full(1e-3)})
    batch = make_batch(model, [[("image", b"\1"), 5]])
    batch.labels.fill_(IGNORE_INDEX)
    loss = NextToken()(model, model(batch), batch)
    assert (loss.total.item(), loss.count, loss.per_sample.tolist()) == (0.0, 0, [0.0])
    loss.total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_no_gradients_are_made_where_none_are_wanted(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    batch = make_batch(model, SAMPLES)
    with torch.no_grad():
        loss = NextToken()(model, model(batch), batch)
        torch.testing.assert_close(loss.total, plain(model, batch))
    assert not loss.total.requires_grad


def test_a_label_at_the_start_of_a_sample_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    for place in (0, 4):
        batch = make_batch(model, [[5, 6, 7, 8], [9, 10]])
        batch.labels[0, place] = 5
        with pytest.raises(ValueError, match="first token of a sample is a label"):
            NextToken()(model, model(batch), batch)


def test_logits_are_made_for_one_chunk_at_a_time() -> None:
    rows: list[int] = []
    weight = torch.randn(50, 8)

    def head(hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return hidden @ weight.T

    hidden = torch.randn(100, 8, requires_grad=True)
    labels = torch.randint(0, 50, (100,))
    total, losses = chunked_cross_entropy(hidden, labels, head, chunk=16)
    total.backward()
    assert max(rows) == 16
    assert sum(rows) == 100 + 1  # and one token to find what trains in the head
    torch.testing.assert_close(losses, F.cross_entropy(hidden @ weight.T, labels, reduction="none"))
