"""InfoNCE among the captions of an optimizer step, however it is divided."""

from __future__ import annotations

import math
from dataclasses import replace
from math import inf, nan

import pytest
import torch

from mmfusion import tuning
from mmfusion.data.loader import Division, make_micro_batches
from mmfusion.data.stream import LocalStep
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.generators import base
from mmfusion.models.generators.stored import with_text
from mmfusion.objectives.condition_alignment import ConditionAlignment
from mmfusion.objectives.step_texts import Texts, gather_texts
from mmfusion.training.sequence import own_part
from mmfusion.tuning import Full
from mmfusion.types import Batch, Captions, EncodedSample
from tests.models.generators.tiny import save_stable_diffusion
from tests.models.tiny import save_llm
from tests.objectives.test_targets import encoded, made

CAPTIONS = ("w1", "w2 w3", None, "w1", "w4", None, "w5 w1", "w2")
KNOWN = ["w1", "w2", "w2 w3", "w4", "w5 w1"]
"""Each once, sorted."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AnyToAnyModel:
    folder = tmp_path_factory.mktemp("contrastive")
    save_stable_diffusion(folder / "sd")
    save_llm(folder / "llm")
    model = made(folder, step_captions=["image"])
    tuning.apply(model, {"output_projectors": Full(1e-3)})
    return model


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (sum(a**2) ** 0.5 * sum(b**2) ** 0.5))


def batches(
    model: AnyToAnyModel, micro_batches: int, samples: list[EncodedSample] | None = None
) -> list[Batch]:
    """A step of four packs of two samples each."""
    samples = samples or encoded(model, *CAPTIONS)
    packs = [samples[i : i + 2] for i in range(0, len(samples), 2)]
    step = LocalStep(packs=packs, record=None)  # type: ignore[arg-type]
    return make_micro_batches(step, Division(4, 4 // micro_batches), model.processor(), False)


def test_the_first_micro_batch_tells_the_captions_of_its_step(model: AnyToAnyModel) -> None:
    first, *others = batches(model, 4)
    assert first.step_captions == {"image": Captions(KNOWN, {})}
    assert all(batch.step_captions == {} for batch in others)
    assert batches(model, 1)[0].step_captions == first.step_captions


def test_it_is_cross_entropy_over_the_distinct_captions_of_the_step(model: AnyToAnyModel) -> None:
    (batch,) = batches(model, 1)
    output = model(batch)
    losses = {}
    for weight in (0.0, 2.0):
        objective = ConditionAlignment("image", "cosine", contrastive=weight, temperature=0.1)
        objective.begin_step(model, batch)
        losses[weight] = objective(model, output, batch)
    ours = output.conditioning["image"].tokens.detach()
    wanted = {c: model.generator("image").encode_text([c]).tokens[0] for c in CAPTIONS if c}
    assert len(wanted) == 5  # the two targets of one caption are of one class
    expected = []
    for one, caption in zip(ours, filter(None, CAPTIONS), strict=True):
        scores = {
            text: sum(cosine(a, b) for a, b in zip(one, theirs, strict=True)) / len(one) / 0.1
            for text, theirs in wanted.items()
        }
        everything = math.log(sum(math.exp(score) for score in scores.values()))
        expected.append(everything - scores[caption])
    found = (losses[2.0].total - losses[0.0].total).detach()
    assert float(found) == pytest.approx(2.0 * sum(expected), rel=1e-4)
    assert int(losses[2.0].count) == 6


def gradients(
    model: AnyToAnyModel, micro_batches: int, samples: list[EncodedSample] | None = None
) -> list[torch.Tensor]:
    model.zero_grad()
    objective = ConditionAlignment("image", contrastive=1.0)
    for number, batch in enumerate(batches(model, micro_batches, samples)):
        if number == 0:
            objective.begin_step(model, batch)
        objective(model, model(batch), batch).total.backward()
    return [p.grad.clone() for p in model.output_projectors.parameters()]


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_any_split_of_a_step_gives_the_same_gradients(
    model: AnyToAnyModel, micro_batches: int
) -> None:
    whole, split = gradients(model, 1), gradients(model, micro_batches)
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert any(grad.abs().max() > 1e-3 for grad in whole)


def test_the_captions_of_a_step_are_encoded_once(
    model: AnyToAnyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, generator = [], model.generator("image")
    encode = generator.encode_text
    monkeypatch.setattr(generator, "encode_text", lambda c: calls.append(list(c)) or encode(c))
    gradients(model, 4)
    assert calls == [KNOWN]


def test_the_captions_of_a_step_are_encoded_in_passes_of_bounded_memory(
    model: AnyToAnyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls, generator = gradients(model, 4), [], model.generator("image")
    encode = generator.encode_text
    monkeypatch.setattr(generator, "encode_text", lambda c: calls.append(list(c)) or encode(c))
    monkeypatch.setattr(base, "CAPTIONS_TOGETHER", 2)
    for a, b in zip(whole, gradients(model, 4), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert calls == [KNOWN[:2], KNOWN[2:4], KNOWN[4:]]


def test_captions_that_differ_in_spaces_alone_are_one(model: AnyToAnyModel) -> None:
    samples = encoded(model, "w2 w3", " w2  w3\n", "w1", "w2\tw3", "w1 ", "w1")
    assert [sample.captions for sample in samples[:2]] == [("w2 w3",), ("w2 w3",)]
    (batch,) = batches(model, 1, samples)
    assert batch.step_captions == {"image": Captions(["w1", "w2 w3"], {})}


def test_encodings_that_come_with_the_targets_do_as_well(
    model: AnyToAnyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = model.generator("image")
    live = gradients(model, 4)
    samples = []
    for sample in encoded(model, *CAPTIONS):
        texts = [with_text(generator.encode_text([caption])) for caption in sample.captions]
        targets = tuple(
            {**target, **{name: rows[0] for name, rows in text.items()}}
            for target, text in zip(sample.targets, texts, strict=True)
        )
        samples.append(replace(sample, targets=targets))
    monkeypatch.setattr(generator, "encode_text", None)
    for a, b in zip(live, gradients(model, 4, samples), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_evaluation_compares_the_captions_of_the_batch(model: AnyToAnyModel) -> None:
    first, second = batches(model, 2)
    objective = ConditionAlignment("image", contrastive=1.0)
    objective.begin_step(model, first)
    trained = objective(model, model(first), first).total
    alone = objective.eval()(model, model(first), first).total
    assert float(alone) < float(trained)  # fewer captions to be told apart from
    assert objective(model, model(second), second).count == 3


def test_ranks_that_share_a_batch_compare_the_same_captions_in_evaluation(
    model: AnyToAnyModel,
) -> None:
    (batch,) = batches(model, 1)
    objective = ConditionAlignment("image", contrastive=1.0).eval()
    output = model(batch)
    whole = objective(model, output, batch).per_sample
    found = torch.zeros_like(whole)
    for rank in range(2):
        part = own_part(batch, rank, 2)
        assert not part.targets["image"].idle
        embeds, _ = model.embed(batch)
        states = model._states(embeds, batch)
        given = model.condition("image", states, embeds, part.targets["image"].slots)
        found += objective(model, replace(output, conditioning={"image": given}), part).per_sample
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)


def test_a_step_that_was_not_begun_is_refused(model: AnyToAnyModel) -> None:
    texts = Texts(["w1"], model.generator("image").encode_text(["w1"]))
    with pytest.raises(ValueError, match=r"\['w9'\] are not among the 1 of this step"):
        texts.places(["w1", "w9"])


def test_a_step_without_captions_has_no_texts() -> None:
    assert gather_texts(Captions([], {}), lambda own: 1 / 0, torch.device("cpu")) is None


@pytest.mark.parametrize(
    "options",
    [{name: value} for name in ("contrastive", "temperature") for value in (-1.0, nan, inf)]
    + [{"temperature": 0.0}],
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected a weight of 0 or more"):
        ConditionAlignment("image", **options)
