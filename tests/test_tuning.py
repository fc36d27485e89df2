"""Policies on a tiny model from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmfusion import tuning
from mmfusion.audit import audit
from mmfusion.models.projectors.mlp import MLP
from mmfusion.tuning import Frozen, Full, LoRA, NewTokens, TuningError
from tests.models.tiny import make_batch, save_llm, tiny_model, train_step

SAMPLES = [[("image", b"\1\2"), 5, 6, 7], [8, 9, 10]]
AUDIO = {f"input_projectors.audio.{n}" for n, _ in MLP(8, 32).named_parameters()}
FULL = {"input_projectors": Full(lr=1e-3)}


def test_what_is_not_named_is_frozen(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    tuning.apply(model, {**FULL, "encoders.image": Frozen()})
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trains == [name for name, _ in model.named_parameters() if "projector" in name]
    assert len(trains) == 4


def test_groups_carry_rate_and_decay_and_spare_vectors(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    groups = tuning.apply(
        model, {"input_projectors": Full(1e-3, weight_decay=0.1), "llm": LoRA(2e-4, r=2)}
    )
    found = [(g["name"], g["part"], g["lr"], g["weight_decay"], len(g["params"])) for g in groups]
    assert found == [
        ("input_projectors/Full", "input_projectors", 1e-3, 0.1, 2),
        ("input_projectors/Full/no_decay", "input_projectors", 1e-3, 0.0, 2),
        ("llm/LoRA", "llm", 2e-4, 0.0, 2 * 2 * 7),
    ]
    assert all(p.ndim == 1 for p in groups[1]["params"])


@pytest.mark.parametrize(
    ("targets", "layers"),
    [("all-linear", 14), (["q_proj", "v_proj"], 4), (r".*layers\.0\..*(up|down)_proj", 2)],
)
def test_lora_starts_at_the_base_model_and_trains_its_targets_only(
    tmp_path: Path, targets: str | list[str], layers: int
) -> None:
    model = tiny_model(tmp_path, {"image": MLP}, dtype="bfloat16")
    batch = make_batch(model, SAMPLES)
    before = model(batch).hidden_states
    groups = tuning.apply(model, {"llm": LoRA(1e-2, r=2, targets=targets)})
    torch.testing.assert_close(model(batch).hidden_states, before, rtol=0, atol=0)
    assert len(groups[0]["params"]) == 2 * layers
    assert {p.dtype for p in groups[0]["params"]} == {torch.float32}
    base = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    train_step(model, groups, SAMPLES)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert not torch.equal(model(batch).hidden_states, before)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("with_lora", [True, False])
def test_only_the_added_rows_train(tmp_path: Path, tied: bool, with_lora: bool) -> None:
    save_llm(tmp_path, tie_word_embeddings=tied)
    model = tiny_model(tmp_path, {"image": MLP}, new_tokens=["[A]", "[B]"])
    new = model.llm.new_token_ids
    old = [index for index in range(60) if index not in new]
    policies = [NewTokens(0.5, weight_decay=0.1)] + [LoRA(1e-3, r=2)] * with_lora
    policies = policies[::-1] if tied else policies  # in either order
    tables = ("get_input_embeddings", "get_output_embeddings")
    before = [getattr(model.llm.model, name)().weight.detach().clone() for name in tables]
    groups = tuning.apply(model, {**FULL, "llm": policies})
    table = audit(model, groups)
    assert table.rows[-1].trainable >= 2 * 32
    train_step(model, groups, [[("image", b"\1"), 5, new[0], 6, new[1], 7]])
    for name, rows in zip(tables, before, strict=True):
        layer = getattr(model.llm.model, name)()
        merged = layer.get_merged_weights(layer.active_adapters)
        assert torch.equal(merged[old], rows[old])
        assert (merged[new] != rows[new]).any(1).all()
    merged = [getattr(model.llm.model, n)().get_merged_weights(["default"]) for n in tables]
    assert torch.equal(*merged) == tied


def test_new_rows_start_at_the_mean(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    old = model.llm.model.get_input_embeddings().weight
    grown = tiny_model(tmp_path, {"image": MLP}, new_tokens=[f"[{i}]" for i in range(30)])
    rows = grown.llm.model.get_input_embeddings().weight
    assert grown.llm.new_token_ids == list(range(40, 70))
    assert len(rows) == 70
    assert torch.equal(rows[:40], old[:40])
    torch.testing.assert_close(rows[40:], old[:40].mean(0).expand(30, -1))


def test_a_bf16_part_that_trains_wholly_does_so_in_fp32(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP}, dtype="bfloat16")
    groups = tuning.apply(model, {**FULL, "llm": Full(1e-4)})
    assert {p.dtype for group in groups for p in group["params"]} == {torch.float32}
    train_step(model, groups, SAMPLES)


def test_a_key_that_names_no_part_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    with pytest.raises(TuningError, match=r"did you mean 'input_projectors\.image'"):
        tuning.apply(model, {"input_projector.image": Full(1e-3)})


@pytest.mark.parametrize("targets", [["q_proj", "query"], r".*query", ["lm_heads"]])
def test_lora_targets_that_match_nothing_are_refused(tmp_path: Path, targets: object) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    with pytest.raises(TuningError, match=r"match no linear layer.*q_proj"):
        tuning.apply(model, {"llm": LoRA(1e-4, targets=targets)})


def test_new_tokens_policy_without_new_tokens_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    for part in ("llm", "input_projectors"):
        with pytest.raises(TuningError, match="finds no new tokens"):
            tuning.apply(model, {part: NewTokens(1e-3)})


def test_lora_and_new_tokens_on_the_same_head_are_refused(tmp_path: Path) -> None:
    save_llm(tmp_path, tie_word_embeddings=False)
    model = tiny_model(tmp_path, {"image": MLP}, new_tokens=["[A]"])
    policies = [LoRA(1e-3, r=2, targets=["lm_head"]), NewTokens(1e-3)]
    with pytest.raises(TuningError, match="which PEFT cannot combine"):
        tuning.apply(model, {"llm": policies})


def test_a_parameter_claimed_twice_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    with pytest.raises(TuningError, match="claimed by input_projectors/Full and by"):
        tuning.apply(model, {**FULL, "input_projectors.image": Full(1e-4)})


def test_applying_twice_keeps_trained_adapters(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    policies = {"llm": LoRA(1e-2, r=2)}
    train_step(model, tuning.apply(model, policies), SAMPLES)
    trained = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuning.apply(model, policies)
    assert all(torch.equal(p, trained[n]) for n, p in model.named_parameters())
