"""Alignment and denoising on a tiny Stable Diffusion, against slow references."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from mmfusion import tuning
from mmfusion.audit import audit
from mmfusion.data.collate import collate
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.generators.base import PARTS
from mmfusion.models.generators.stable_diffusion import StableDiffusion
from mmfusion.models.generators.stable_diffusion_3 import StableDiffusion3
from mmfusion.models.llms.hf_causal_lm import HFCausalLM
from mmfusion.models.output_projectors.mlp import Linear
from mmfusion.models.output_projectors.query_decoder import QueryDecoder
from mmfusion.objectives.condition_alignment import ConditionAlignment
from mmfusion.objectives.denoising import Denoising
from mmfusion.training.module import MultimodalModule
from mmfusion.tuning import Full, NewTokens, TuningError
from mmfusion.types import (
    Batch,
    ConditioningSpec,
    EncodedSample,
    Media,
    Message,
    Sample,
    SampleRef,
    Text,
)
from tests.models.generators.families import picture
from tests.models.generators.tiny import save_stable_diffusion, save_stable_diffusion_3
from tests.models.tiny import save_llm

SMALL = {"dim": 16, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "ffn_dim": 24}

LORA = tuning.LoRA(1e-3, r=2)


def decoder(in_dim: int, spec: ConditioningSpec) -> QueryDecoder:
    return QueryDecoder(in_dim, spec, layers=(1, -1), **SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    save_stable_diffusion(folder / "sd")
    save_llm(folder / "llm")
    return folder


def made(
    folder: Path, projector: Any = decoder, captioned: tuple[str, ...] = (), **options: Any
) -> AnyToAnyModel:
    torch.manual_seed(0)
    model = AnyToAnyModel(
        {},
        {},
        HFCausalLM(str(folder / "llm")),
        {"image": 3},
        {"image": projector},
        {"image": StableDiffusion(str(folder / "sd"))},
        {"image": PARTS},
        captioned,
        **options,
    )
    model.build()
    return model.eval()


def encoded(model: AnyToAnyModel, *captions: str | None) -> list[EncodedSample]:
    """A sample for each caption; None is one that answers in words."""
    samples = []
    for index, caption in enumerate(captions):
        media = picture(index)
        answer = Media("image", media.data, "png", caption=caption) if caption else Text("w3")
        turns = (Message("user", (Text("w1 w2"),)), Message("assistant", (answer,)))
        ref = SampleRef("s", 0, index, index)
        samples.append(model.processor().encode(Sample(turns), None, ref))
    return samples


def batch_of(model: AnyToAnyModel, *captions: str | None) -> Batch:
    """Of the samples of :func:`encoded`."""
    return collate(encoded(model, *captions), model.processor())


def test_a_baseline_is_what_the_same_tokens_say_where_nothing_is_asked_for(folder: Path) -> None:
    def relative(in_dim: int, spec: ConditioningSpec) -> QueryDecoder:
        return QueryDecoder(in_dim, spec, layers=(1, -1), baseline="w9", **SMALL)

    plain, model = made(folder), made(folder, relative)
    model.output_projectors.load_state_dict(plain.output_projectors.state_dict())
    turns = (Message("user", (Text("w9"),)), Message("assistant", (picture(0),)))
    asked_nothing = model.processor().encode(Sample(turns), None, SampleRef("s", 0, 9, 9))
    given = [*encoded(model, "w1", "w2 w3"), asked_nothing]
    found = model(collate(given, model.processor())).conditioning["image"].tokens
    nothing = torch.zeros(1, 3, model.llm.hidden_dim)
    projector: Any = model.output_projectors["image"]
    zero = projector(dict.fromkeys(projector.layers, nothing), nothing).tokens
    torch.testing.assert_close(found[2:], zero, atol=1e-5, rtol=1e-4)
    assert (found[:2] - zero).abs().amax((1, 2)).min() > 1e-3
    as_it_is = plain(collate(given, plain.processor())).conditioning["image"].tokens
    assert (found - as_it_is).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("distance", ["mse", "l2", "cosine"])
def test_alignment_is_the_distance_to_the_text_encoding(folder: Path, distance: Any) -> None:
    model = made(folder)
    batch = batch_of(model, "w1", None, "w2 w3")
    output = model(batch)
    loss = ConditionAlignment("image", distance)(model, output, batch)
    found = output.conditioning["image"].tokens
    wanted = model.generator("image").encode_text(["w1", "w2 w3"]).tokens
    each = []
    for ours, theirs in zip(found, wanted, strict=True):
        terms = []
        for a, b in zip(ours, theirs, strict=True):
            if distance == "mse":
                terms.append(sum((a - b) ** 2) / len(a))
            elif distance == "l2":
                terms.append(sum((a - b) ** 2) ** 0.5)
            else:
                terms.append(1 - (a @ b) / (sum(a**2) ** 0.5 * sum(b**2) ** 0.5))
        each.append(sum(terms) / len(terms))
    torch.testing.assert_close(loss.total, sum(each))
    assert int(loss.count) == 2
    torch.testing.assert_close(
        loss.per_sample, torch.stack([each[0], torch.zeros(()), each[1]]).detach()
    )
    assert loss.per_sample_count.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "objective", [ConditionAlignment("image"), Denoising("image", drop_condition=0.3)]
)
def test_gradients_reach_projector_and_rows_and_nothing_frozen(
    folder: Path, objective: Any
) -> None:
    model = made(folder)
    tuning.apply(model, {"output_projectors": Full(1e-3), "llm": NewTokens(1e-3)})
    batch = batch_of(model, "w1", "w2")
    output = model(batch)
    (objective(model, output, batch).total + output.idle).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lm_head" not in name:
            assert parameter.grad.abs().sum() > 0, name
        elif not parameter.requires_grad:
            assert parameter.grad is None


@pytest.mark.parametrize("objective", [ConditionAlignment("image"), Denoising("image")])
def test_without_targets_the_loss_is_zero_with_the_same_graph(folder: Path, objective: Any) -> None:
    model = made(folder)
    tuning.apply(model, {"output_projectors": Full(1e-3)})
    batch = batch_of(model, None, None)
    output = model(batch)
    loss = objective(model, output, batch)
    assert (float(loss.total), int(loss.count)) == (0.0, 0)
    (loss.total + output.idle).backward()
    grads = [p.grad for p in model.output_projectors.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


@pytest.mark.parametrize("objective", [ConditionAlignment("image"), Denoising("image")])
def test_without_targets_all_is_reached_that_a_target_reaches(folder: Path, objective: Any) -> None:
    """The LLM too, which no other objective may reach: ranks wait for one another's gradients."""
    model = made(folder)
    tuning.apply(model, {"output_projectors": Full(1e-3), "llm": [NewTokens(1e-3), LORA]})
    reached = []
    for caption in ("w1", None):
        batch = batch_of(model, caption)
        model.zero_grad()
        output = model(batch)
        (objective(model, output, batch).total + output.idle).backward()
        reached.append({name for name, p in model.named_parameters() if p.grad is not None})
    assert reached[0] == reached[1]
    assert any(".lora_" in name for name in reached[1])
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_generator_that_trains_runs_on_idle_targets_too(folder: Path) -> None:
    model = made(folder)
    tuning.apply(model, {"generators.image.denoiser": tuning.LoRA(1e-3, r=2, targets=["to_q"])})
    batch = batch_of(model, None)
    loss = Denoising("image")(model, model(batch), batch)
    assert float(loss.total) == 0.0
    loss.total.backward()
    assert all(p.grad is not None for p in model.generators.parameters() if p.requires_grad)


def test_dropped_conditioning_is_that_of_no_words(folder: Path) -> None:
    model = made(folder)
    batch = batch_of(model, *("w1" for _ in range(12)))
    output = model(batch)
    objective = Denoising("image", drop_condition=0.5)
    target = batch.targets["image"]
    found = objective._dropped(
        output.conditioning["image"], model.generator("image"), target
    ).tokens
    empty = model.generator("image").encode_text([""]).tokens[0]
    dropped = [torch.equal(one, empty) for one in found]
    kept = [
        torch.equal(a, b) for a, b in zip(found, output.conditioning["image"].tokens, strict=True)
    ]
    assert [not x for x in dropped] == kept
    assert 2 <= sum(dropped) <= 10


def test_conditioning_of_another_shape_cannot_be_compared(folder: Path) -> None:
    model = made(folder, Linear)
    batch = batch_of(model, "w1")
    with pytest.raises(ValueError, match=r"shape \(1, 3, 32\), .* \(1, 12, 32\); they must"):
        ConditionAlignment("image")(model, model(batch), batch)
    assert Denoising("image")(model, model(batch), batch).total > 0  # a U-Net takes any number


def test_a_mistyped_part_of_a_generator_is_answered_with_its_parts(folder: Path) -> None:
    model = made(folder)
    with pytest.raises(TuningError, match=r"'generators\.image\.denoiser'") as error:
        tuning.apply(model, {"generators.image.unet": Full(1e-3)})
    assert "did you mean" not in str(error.value)
    with pytest.raises(TuningError, match=r"did you mean 'generators\.image\.denoiser'\?"):
        tuning.apply(model, {"generators.image.denoise": Full(1e-3)})


def test_the_parts_of_a_generator_that_policies_name_are_built(folder: Path) -> None:
    model, full, frozen = made(folder), Full(1e-3), tuning.Frozen()
    for policies, parts in (
        ({"llm": full, "generators.video": full, "generators.image.vea": full}, set()),
        ({"generators.image.denoiser.mid_block": tuning.LoRA(1e-3)}, {"denoiser"}),
        ({"generators.image.vae": frozen}, {"vae"}),
        ({"generators.image": frozen, "generators": [frozen]}, set()),
        ({"generators": [frozen, full]}, {"denoiser", "text_encoder", "vae"}),
    ):
        assert tuning.named_parts(policies, model) == {"image": parts}


def test_a_projector_that_neither_trains_nor_was_loaded_is_refused(folder: Path) -> None:
    model = made(folder)
    groups = tuning.apply(model, {"llm": NewTokens(1e-3)})
    with pytest.raises(TuningError, match=r"random parameters neither train .*output_projectors"):
        audit(model, groups)
    groups = tuning.apply(model, {"output_projectors": Full(1e-3)})
    with pytest.raises(TuningError, match="3 new tokens, but their rows"):
        audit(model, groups)


def test_options_out_of_range_are_refused() -> None:
    bad = ({"drop_condition": 1.0}, {"drop_condition": -0.1}, {"min_snr": -1.0}, {"min_snr": nan})
    for options in bad:
        with pytest.raises(ValueError, match="expected a share below 1"):
            Denoising("image", **options)
    for seed in (1.5, 2**70):
        with pytest.raises(ValueError, match="expected a whole number of 64 bits"):
            Denoising("image", seed=cast(int, seed))


def test_weights_that_a_generator_does_not_have_are_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path
) -> None:
    path = Path(save_stable_diffusion(tmp_path / "sd"))
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    for file in path.rglob("*.safetensors"):
        file.unlink()
    llm, generator = HFCausalLM(str(folder / "llm")), StableDiffusion(str(path))
    message = r"of image by StableDiffusion: min_snr is 5.0, but FlowNoise has no .* min_snr at 0"
    with pytest.raises(ValueError, match=message):
        MultimodalModule(
            {}, {}, llm, {"loss": Denoising("image", min_snr=5.0)}, {}, {"image": 3},
            {"image": decoder}, {"image": generator},
        )  # fmt: skip


def module_of(folder: Path, projector: Any, objective: Any, generator: Any) -> MultimodalModule:
    llm = HFCausalLM(str(folder / "llm"))
    return MultimodalModule(
        {}, {}, llm, {"loss": objective}, {}, {"image": 3}, {"image": projector},
        {"image": generator},
    )  # fmt: skip


def test_what_a_projector_cannot_give_is_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path
) -> None:
    save_stable_diffusion_3(tmp_path / "3")
    for name in ("sd", "llm"):
        shutil.copytree(folder / name, tmp_path / name)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    generator = StableDiffusion(str(tmp_path / "sd"))
    module_of(tmp_path, decoder, ConditionAlignment("image"), generator)
    module_of(tmp_path, Linear, Denoising("image", drop_condition=0.1), generator)
    with pytest.raises(ValueError, match=r"shape \(3, 32\), the text encoding has \(12, 32\)"):
        module_of(tmp_path, Linear, ConditionAlignment("image"), generator)
    deep = partial(QueryDecoder, layers=(1, 7), **SMALL)
    with pytest.raises(ValueError, match=r"layers \[1, 7\], but it has 2: there is no 7"):
        module_of(tmp_path, deep, Denoising("image"), generator)
    jointly = StableDiffusion3(str(tmp_path / "3"), t5_tokens=6)
    module_of(tmp_path, Linear, Denoising("image"), jointly)
    message = r"Denoising of image by StableDiffusion3: .* attends to text and picture at once"
    with pytest.raises(ValueError, match=message):
        module_of(tmp_path, Linear, Denoising("image", drop_condition=0.1), jointly)


class Wide(Linear):
    """Another width than the generator takes, or a pooled vector that nothing takes."""

    def __init__(self, in_dim: int, spec: ConditioningSpec, dim: int, pooled_dim: int) -> None:
        super().__init__(in_dim, replace(spec, dim=dim, pooled_dim=pooled_dim))


@pytest.mark.parametrize(
    ("dim", "pooled_dim", "message"),
    [
        (33, 0, r"\(Wide\) gives .* width 33 with a pooled vector of 0, .* takes 32 and 0"),
        (32, 7, r"\(Wide\) gives .* width 32 with a pooled vector of 7, .* takes 32 and 0"),
    ],
)
def test_a_projector_of_another_width_is_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path, dim: int, pooled_dim: int, message: str
) -> None:
    """Whatever the objectives are: denoising alone would find it in the U-Net's first layer."""
    for name in ("sd", "llm"):
        shutil.copytree(
            folder / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors")
        )
    generator = StableDiffusion(str(tmp_path / "sd"))
    wide = partial(Wide, dim=dim, pooled_dim=pooled_dim)
    with pytest.raises(ValueError, match=message):
        module_of(tmp_path, wide, Denoising("image"), generator)
    module_of(tmp_path, partial(Wide, dim=32, pooled_dim=0), Denoising("image"), generator)


@pytest.mark.parametrize("weight", [-1.0, nan, inf])
def test_a_weight_that_cannot_be_meant_is_refused(folder: Path, weight: float) -> None:
    with pytest.raises(
        ValueError, match=rf"model\.objectives\.loss: weight is {weight}; expected 0"
    ):
        module_of(folder, decoder, Denoising("image", weight=weight), None)


def test_objectives_that_all_weigh_nothing_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.objectives \['loss'\] have weight 0: nothing"):
        module_of(folder, decoder, Denoising("image", weight=0), None)


def test_parts_of_the_output_side_must_match(folder: Path) -> None:
    llm = HFCausalLM(str(folder / "llm"))
    with pytest.raises(ValueError, match="give each modality one of all three"):
        AnyToAnyModel({}, {}, llm, {"image": 3})
    generator = StableDiffusion(str(folder / "sd"))
    with pytest.raises(ValueError, match=r"signal_tokens\.image is 0"):
        AnyToAnyModel({}, {}, llm, {"image": 0}, {"image": decoder}, {"image": generator})
