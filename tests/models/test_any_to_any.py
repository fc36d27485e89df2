"""The whole forward pass, on tiny models loaded from disk."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.encoders.hf_vision import HFVision
from mmfusion.models.llms.hf_causal_lm import HFCausalLM
from mmfusion.models.projectors.learned_tokens import LearnedTokens
from mmfusion.models.projectors.linear import Linear
from mmfusion.models.projectors.mlp import MLP
from mmfusion.objectives.next_token import NextToken
from mmfusion.types import (
    IGNORE_INDEX,
    Batch,
    BatchSample,
    Media,
    MediaBatch,
    Message,
    Sample,
    SampleRef,
    Text,
)
from tests.models.tiny import TinyEncoder, make_batch, save_clip, save_llm, tiny_model

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


@pytest.mark.parametrize("encoder_trains", [True, False])
def test_absent_modality_keeps_projector_in_graph_and_changes_nothing(
    tmp_path: Path, encoder_trains: bool
) -> None:
    model = tiny_model(tmp_path, PROJECTORS, encoder_trains=encoder_trains)
    objective = NextToken()
    batch = make_batch(model, SAMPLES[2:])  # images, no audio
    assert batch.media["audio"].idle
    output = model(batch)
    loss = objective(model, output, batch).total
    (loss + output.idle).backward()
    assert output.idle.item() == 0.0
    for name, parameter in model.named_parameters():
        if ".audio." in name and parameter.requires_grad:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
    assert all(p.grad.abs().sum() > 0 for p in model.input_projectors["image"].parameters())
    assert model.encoders["audio"].calls == int(encoder_trains)

    without = tiny_model(tmp_path, {"image": MLP}, encoder_trains=encoder_trains)
    without.load_state_dict(model.state_dict(), strict=False)
    alone = make_batch(without, SAMPLES[2:])
    torch.testing.assert_close(objective(without, without(alone), alone).total, loss)


def test_a_batch_without_any_media_has_a_graph_for_every_projector(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, PROJECTORS)
    batch = make_batch(model, [[5, 6, 7]])
    output = model(batch)
    output.hidden_states.sum().backward()
    assert all(not p.grad.any() for p in model.input_projectors.parameters())


def test_frozen_encoders_do_not_run_on_idle_rows(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    batch = make_batch(model, [[5, 6, 7]])
    model(batch)
    assert model.encoders["image"].calls == 0
    model.encoders["image"].requires_grad_(True)
    model(batch)
    assert model.encoders["image"].calls == 1


def test_learned_tokens_never_run_the_frozen_encoder(tmp_path: Path) -> None:
    like = lambda i, o: Linear(i, o, stack=2)  # noqa: E731
    model = tiny_model(tmp_path, {"image": lambda i, o: LearnedTokens(i, o, like=like)})
    one, other = (make_batch(model, [[("image", data), 5, 6]]) for data in (b"\1\2\3", b"\7\7\7"))
    assert one.media["image"].num_tokens.tolist() == [2]
    output = model(one)
    assert torch.equal(output.hidden_states, model(other).hidden_states)
    assert model.encoders["image"].calls == 0
    NextToken()(model, output, one).total.backward()
    used = model.input_projectors["image"].tokens.grad.abs().sum(1) > 0
    assert used.tolist() == [True, True] + [False] * 254


def test_media_items_reach_their_own_slots(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, PROJECTORS)
    batch = make_batch(model, SAMPLES)
    embeds, media_tokens = model.embed(batch)
    image = model.input_projectors["image"](
        model.encoders["image"](batch.media["image"].tensors), torch.ones(4, 4, dtype=torch.bool)
    )
    torch.testing.assert_close(media_tokens["image"], image)
    torch.testing.assert_close(embeds[0, :3], image[0, :3])  # three features of the first item
    torch.testing.assert_close(embeds[0, 11:13], image[1, :2])
    torch.testing.assert_close(embeds[0, 13:14], image[2, :1])
    text = batch.input_ids[0, 3:6]
    assert torch.equal(embeds[0, 3:6], model.llm.embed(text))


def test_counts_that_differ_are_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    batch = make_batch(model, [[("image", b"\1\2\3"), 5, 6]])
    media = batch.media["image"]

    def refused(match: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=match):
            model(replace(batch, media={"image": replace(media, **changes)}))

    refused("3 placeholder tokens in the text, 2 slots, 2 of", slots=media.slots[:2])
    refused("3 slots, 2 of them on a placeholder", slots=media.slots + 1)
    refused(r"gives \[2\] tokens.*slots are \[3\]", num_features=torch.tensor([2]))
    refused("expected 1 items of up to 5 features", num_features=torch.tensor([5]))
    with pytest.raises(ValueError, match=r"says nothing of \['image'\]"):
        model(replace(batch, media={}))


def test_a_training_step_reads_nothing_back_from_the_device(tmp_path: Path) -> None:
    """On torch's meta device, which has no values to read."""
    model = tiny_model(tmp_path, PROJECTORS).to("meta")
    for samples in (SAMPLES, [[5, 6, 7], [8, 9]]):
        batch = make_batch(model, samples).to("meta")
        output = model(batch)
        loss = NextToken()(model, output, batch)
        (loss.total + output.idle).backward()
        assert loss.per_sample.device.type == "meta"


def test_a_moved_batch_is_checked_as_it_is_now(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    batch = make_batch(model, [[("image", b"\1\2\3"), 5, 6]])
    moved = batch.to(torch.device("cpu"))
    assert moved.host is batch
    changed = replace(moved, input_ids=moved.input_ids * 0)
    with pytest.raises(ValueError, match="0 placeholder tokens in the text, 3 slots"):
        model(changed)


def test_encoders_and_projectors_must_pair(tmp_path: Path) -> None:
    llm = HFCausalLM(save_llm(tmp_path))
    with pytest.raises(ValueError, match="give each modality one of both"):
        AnyToAnyModel({"image": TinyEncoder()}, {"audio": MLP}, llm)


def test_the_processor_works_before_the_weights_and_in_other_processes(tmp_path: Path) -> None:
    projectors = {"image": partial(Linear, stack=2)}
    model = AnyToAnyModel({"image": TinyEncoder()}, projectors, HFCausalLM(save_llm(tmp_path)))
    processor = pickle.loads(pickle.dumps(model.processor()))  # noqa: S301 (our own bytes)
    image = Media("image", b"\1\2\3", "bin")
    sample = Sample(
        (Message("user", (image, Text("w1"))), Message("assistant", (Text("w2 w3"),))), "plain"
    )
    planned = processor.plan(sample)
    assert [(m.num_features, m.num_tokens) for m in planned.media] == [(3, 2)]
    assert model.processor() is model.processor()
    assert model.llm.model is None


def test_building_twice_changes_nothing(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, {"image": MLP})
    before = {name: id(p) for name, p in model.named_parameters()}
    model.llm.build()
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_llava_shaped_model_equals_transformers_llava(tmp_path: Path) -> None:
    vision, text = save_clip(tmp_path / "clip"), save_llm(tmp_path / "llm")
    torch.manual_seed(0)
    model = AnyToAnyModel({"image": HFVision(vision)}, {"image": MLP}, HFCausalLM(text))
    model.build()
    placeholder = model.processor().placeholder_ids["image"]
    reference = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig.from_pretrained(vision),
            text_config=model.llm.config,
            image_token_index=placeholder,
            image_seq_length=4,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            projector_hidden_act="gelu",
        )
    ).eval()
    projector = model.input_projectors["image"].layers
    reference.model.vision_tower.load_state_dict(model.encoders["image"].model.state_dict())
    reference.model.language_model.load_state_dict(model.llm.model.model.state_dict())
    reference.lm_head.load_state_dict(model.llm.model.lm_head.state_dict())
    bridge = reference.model.multi_modal_projector
    bridge.linear_1.load_state_dict(projector[0].state_dict())
    bridge.linear_2.load_state_dict(projector[2].state_dict())

    pixels = torch.randn(3, 3, 16, 16)
    image = [placeholder] * 4
    rows = [[*image, 5, 6, 7, 8, 9], [1, *image, 10, 11, 12, 13], [14, 15, 16, *image, 17, 18]]
    ids = torch.tensor(rows)
    labels = ids.masked_fill(ids == placeholder, IGNORE_INDEX)
    labels[:, 0] = IGNORE_INDEX
    theirs = reference(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False)

    slots = (ids.flatten() == placeholder).nonzero().squeeze(1)
    counts = torch.tensor([4, 4, 4])
    batch = Batch(
        input_ids=ids.view(1, -1),
        labels=labels.view(1, -1),
        position_ids=torch.arange(9).repeat(3)[None],
        cu_seqlens=torch.tensor([0, 9, 18, 27], dtype=torch.int32),
        segment_ids=torch.arange(3).repeat_interleave(9)[None],
        media={"image": MediaBatch({"pixels": pixels}, counts, counts, slots)},
        targets={},
        step_counts={"tokens": (labels != IGNORE_INDEX).sum()},
        samples=[BatchSample(SampleRef("s", 0, i), "", "") for i in range(3)],
    )
    output = model(batch)
    logits = model.llm.logits(output.hidden_states).view_as(theirs.logits)
    torch.testing.assert_close(logits, theirs.logits, atol=1e-5, rtol=1e-5)
    loss = NextToken()(model, output, batch)
    torch.testing.assert_close(loss.total / loss.count, theirs.loss, atol=1e-5, rtol=1e-5)
