"""Validation: every sample once over the ranks, always the same, equal numbers of batches."""

from __future__ import annotations

from collections import Counter

import pytest

from mmfusion.data.reader import Budget
from mmfusion.data.validation import ValidationBatches, spread
from tests.data.synthetic import keys_of, make_data, make_processor, same_tensors, write_source


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("validation")
    folders = {
        "a": write_source(root / "a", 25, bad={3: "odd", 4: "corrupt_image"}),
        "b": write_source(root / "b", 5, seed=1),
    }
    return make_data(folders).sources


def batches(sources, world=1, limit=None, **arguments) -> list[list]:
    ranks = [
        ValidationBatches(
            sources, make_processor(), limit, Budget(40, {"image": 16}), rank, world, **arguments
        )
        for rank in range(world)
    ]
    return [[rank[i] for i in range(len(rank))] for rank in ranks]


@pytest.mark.parametrize("world", [1, 2, 3, 40])
def test_ranks_see_each_good_sample_once_in_equally_many_batches(sources, world):
    ranks = batches(sources, world)
    assert len({len(rank) for rank in ranks}) == 1
    seen = Counter(key for rank in ranks for batch in rank for key in keys_of(batch))
    good = [("a", 0, i) for i in range(25) if i not in (3, 4)] + [("b", 0, i) for i in range(5)]
    assert seen == dict.fromkeys(good, 1)


def test_batches_keep_the_budget_and_are_the_same_every_time(sources):
    one, two = batches(sources)[0], batches(sources)[0]
    for batch, again in zip(one, two, strict=True):
        assert batch.input_ids.numel() <= 40
        assert batch.stream is None
        assert same_tensors(batch, again)


def test_left_out_samples_are_told(sources, caplog):
    with caplog.at_level("WARNING"):
        batches(sources)
    assert "leaves out 1 of 30 samples {'a: odd': 1}" in caplog.text
    assert "corrupt_image" in caplog.text


def test_the_limit_spreads_over_each_source(sources):
    seen = [key for batch in batches(sources, limit=5)[0] for key in keys_of(batch)]
    assert seen == [("a", 0, i) for i in (0, 5, 10, 15, 20)] + [("b", 0, i) for i in range(5)]
    assert spread(3, 10) == [0, 1, 2]
    assert spread(0, None) == []


def test_padded_rows_hold_the_same_samples(sources):
    packed, padded = batches(sources)[0], batches(sources, pad_rows=True)[0]
    assert [keys_of(b) for b in packed] == [keys_of(b) for b in padded]
    assert padded[0].cu_seqlens is None
