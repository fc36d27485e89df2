"""What the audit shows and refuses, on a tiny model from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mmfusion import tuning
from mmfusion.audit import audit
from mmfusion.models.projectors.mlp import MLP
from mmfusion.tuning import Frozen, Full, LoRA, NewTokens, TuningError
from tests.models.tiny import make_batch, tiny_model, train_step

SAMPLES = [[("image", b"\1\2"), 5, 6, 7], [8, 9, 10]]
AUDIO = {f"input_projectors.audio.{n}" for n, _ in MLP(8, 32).named_parameters()}
FULL = {"input_projectors": Full(lr=1e-3)}


def test_a_projector_neither_trained_nor_loaded_is_refused(tmp_path: Path) -> None:
    """As where a later stage adds a modality that stage 1 never had."""
    model = tiny_model(tmp_path, {"image": MLP, "audio": MLP})
    groups = tuning.apply(model, {"input_projectors.image": Full(1e-3)})
    with pytest.raises(TuningError, match=r"4 random parameters .*input_projectors\.audio"):
        audit(model, groups)
    audit(model, groups, loaded=AUDIO)


def test_audit_shows_each_part(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP, "audio": MLP}, dtype="bfloat16")
    groups = tuning.apply(model, {"input_projectors.image": Full(1e-3), "llm": LoRA(2e-4, r=2)})
    table = audit(model, groups, loaded=AUDIO)
    rows = {row.part: row for row in table.rows}
    assert list(rows) == [
        "encoders.image",
        "encoders.audio",
        "input_projectors.image",
        "input_projectors.audio",
        "llm",
    ]
    assert rows["encoders.image"].trainable == 0
    assert rows["encoders.image"].parameters == 6 * 8 + 8
    projector = 8 * 32 + 32 + 32 * 32 + 32
    image = rows["input_projectors.image"]
    assert (image.kind, image.trainable, image.dtype, image.lr) == (
        *("MLP", projector, "float32", "0.001"),
    )
    assert rows["input_projectors.audio"].lr == "-"
    assert rows["llm"].dtype == "bfloat16, float32"
    assert "input_projectors.image  MLP" in str(table)


def test_audit_refuses_when_nothing_trains(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    with pytest.raises(TuningError, match="nothing trains"):
        audit(model, tuning.apply(model, {"llm": Frozen()}))


def test_audit_refuses_what_was_frozen_again_after_tuning(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    groups = tuning.apply(model, {**FULL, "llm": LoRA(1e-4, r=2)})
    model.llm.requires_grad_(False)
    with pytest.raises(TuningError, match="28 parameters train without"):
        audit(model, groups)


def test_new_tokens_must_train_or_be_loaded(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP}, new_tokens=["[A]"])
    groups = tuning.apply(model, FULL)
    with pytest.raises(TuningError, match="neither train nor were loaded"):
        audit(model, groups)
    tables = {"llm.model.model.embed_tokens.weight", "llm.model.lm_head.weight"}
    for missing in tables:
        with pytest.raises(TuningError, match=missing):
            audit(model, groups, loaded=tables - {missing})
    audit(model, groups, loaded=tables)


def test_new_tokens_of_an_earlier_stage_stay_though_frozen(tmp_path: Path) -> None:
    first = tiny_model(tmp_path, {"image": MLP}, new_tokens=["[A]"])
    groups = tuning.apply(first, {**FULL, "llm": [LoRA(1e-2, r=2), NewTokens(0.1)]})
    train_step(first, groups, [[("image", b"\1"), 5, first.llm.new_token_ids[0], 6]])
    kept = {n: p.detach() for n, p in first.named_parameters() if p.requires_grad}

    second = tiny_model(tmp_path, {"image": MLP}, new_tokens=["[A]"])
    policies = [LoRA(1e-2, r=2, train=False), NewTokens(0.1, train=False)]
    groups = tuning.apply(second, {**FULL, "llm": policies})
    with pytest.raises(TuningError, match="neither train nor were loaded"):
        audit(second, groups)
    assert not second.load_state_dict(kept, strict=False).unexpected_keys
    assert audit(second, groups, loaded=set(kept)).rows[-1].trainable == 0
    batch = make_batch(first, SAMPLES)
    torch.testing.assert_close(second(batch).hidden_states, first(batch).hidden_states)


def test_a_parameter_that_reaches_no_loss_is_refused(tmp_path: Path) -> None:
    class Forgetful(MLP):
        def __init__(self, in_dim: int, out_dim: int) -> None:
            super().__init__(in_dim, out_dim)
            self.unused = nn.Linear(2, 2)

    model = tiny_model(tmp_path, {"image": Forgetful})
    groups = tuning.apply(model, FULL)
    with pytest.raises(TuningError, match=r"2 trainable parameters reach no loss.*unused.weight"):
        train_step(model, groups, SAMPLES)
