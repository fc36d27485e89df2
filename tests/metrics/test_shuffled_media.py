"""The shuffle is strict: same source, other answer, same slots, nothing else changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfusion.metrics.shuffled_media import roll_past_equals, shuffle_media
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.projectors.mlp import MLP
from mmfusion.types import BatchSample, SampleRef
from tests.models.tiny import make_batch, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AnyToAnyModel:
    return tiny_model(tmp_path_factory.mktemp("llm"), {"image": MLP, "audio": MLP})


@given(st.lists(st.integers(0, 4), max_size=12))
def test_roll_is_a_permutation_that_meets_equals_only_where_it_must(values: list[int]) -> None:
    partner = roll_past_equals(values)
    assert sorted(partner) == list(range(len(values)))
    most = max((values.count(value) for value in values), default=0)
    equal = sum(values[i] == values[j] for i, j in enumerate(partner))
    assert equal == max(0, 2 * most - len(values))


@pytest.mark.parametrize("packed", [True, False])
def test_media_come_from_another_answer_with_the_same_slots(
    model: AnyToAnyModel, packed: bool
) -> None:
    samples = [
        [("image", b"\1\2"), 5, 6],
        [("image", b"\3\4"), 5, 6],  # the answer of the first
        [("image", b"\5\6"), 7, 8],
        [("image", b"\7\7"), 9, 9],
        [("image", b"\7\7\7"), 9, 8],  # other slots: no partner
        [10, 11, 12],
        [("audio", b"\1\1"), 5, 5],
    ]
    batch = make_batch(model, samples, packed)
    shuffled, chosen = shuffle_media(batch, "image")
    assert chosen.tolist() == [True, True, True, True, False, False, False]
    first = shuffled.media["image"].tensors["x"][:, 0, 0].mul(10).round().int().tolist()
    assert sorted(first) == [1, 3, 5, 7, 7]
    assert set(first[:2]) == {5, 7}
    assert first[2] in (1, 3, 7)
    assert first[3] in (1, 3, 5)
    assert first[4] == 7
    assert shuffled.media["audio"] is batch.media["audio"]
    assert shuffled.input_ids is batch.input_ids
    assert torch.equal(shuffled.media["image"].slots, batch.media["image"].slots)
    again = shuffle_media(batch, "image")[0].media["image"].tensors["x"]
    assert torch.equal(again, shuffled.media["image"].tensors["x"])
    assert model(shuffled).hidden_states.shape == model(batch).hidden_states.shape


def test_other_sources_and_equal_answers_give_no_partner(model: AnyToAnyModel) -> None:
    batch = make_batch(model, [[("image", b"\1"), 5, 6], [("image", b"\2"), 7, 8]])
    sources = [BatchSample(SampleRef(name, 0, 0), "", "") for name in ("a", "b")]
    apart = replace(batch, samples=sources)
    assert not shuffle_media(apart, "image")[1].any()
    assert shuffle_media(batch, "image")[1].all()
    same = make_batch(model, [[("image", b"\1"), 5, 6], [("image", b"\2"), 5, 6]])
    assert not shuffle_media(same, "image")[1].any()


def test_a_batch_without_the_modality_stays_as_it_is(model: AnyToAnyModel) -> None:
    batch = make_batch(model, [[5, 6, 7]])
    shuffled, chosen = shuffle_media(batch, "image")
    assert shuffled is batch
    assert chosen.tolist() == [False]


def test_a_sample_with_several_items_counts_only_when_all_are_exchanged(
    model: AnyToAnyModel,
) -> None:
    batch = make_batch(
        model, [[("image", b"\1"), ("image", b"\2\2"), 5, 6], [("image", b"\3"), 7, 8]], prompt=2
    )
    assert shuffle_media(batch, "image")[1].tolist() == [False, True]
