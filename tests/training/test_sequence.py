"""What each rank of a group has of a shared pack."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from mmfusion.training.sequence import join_group, own_part, part_bounds
from mmfusion.types import IGNORE_INDEX, Batch, BatchSample, MediaBatch, SampleRef, TargetBatch

PICTURE, SIGNAL, WORD = 90, 91, 5


def a_batch(pieces: list[tuple[str, int]]) -> Batch:
    """One sample of words, pictures and things to be made, of these lengths; all words trained."""
    ids, labels, slots, counts, aims = [WORD], [IGNORE_INDEX], [], [], []
    for kind, count in pieces:
        place = len(ids)
        ids += [{"word": WORD, "picture": PICTURE, "made": SIGNAL}[kind]] * count
        labels += [WORD if kind == "word" else IGNORE_INDEX] * count
        if kind == "picture":
            slots += range(place, place + count)
            counts.append(count)
        elif kind == "made":
            aims.append([place, place + 1])
    number, made = max(1, len(counts)), max(1, len(aims))
    return Batch(
        input_ids=torch.tensor([ids]),
        labels=torch.tensor([labels]),
        position_ids=torch.arange(len(ids))[None],
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        segment_ids=torch.zeros(1, len(ids), dtype=torch.int64),
        media={
            "image": MediaBatch(
                tensors={"pixels": torch.arange(number)},
                num_features=torch.full((number,), 3),
                num_tokens=torch.tensor(counts or [0]),
                slots=torch.tensor(slots, dtype=torch.int64),
                idle=not counts,
            )
        },
        targets={
            "image": TargetBatch(
                tensors={"latents": torch.arange(made)},
                slots=torch.tensor(aims or [[0, 0]]),
                segments=torch.zeros(made, dtype=torch.int64),
                keys=torch.arange(made),
                captions=[f"caption {i}" for i in range(made)],
                idle=not aims,
            )
        },
        step_counts={},
        samples=[BatchSample(SampleRef("words", 0, 0), "shard", "key")],
    )


PIECES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["word", "picture"]), st.integers(1, 9)),
        st.just(("made", 2)),
    ),
    max_size=12,
)


@given(pieces=PIECES, size=st.integers(2, 5))
def test_parts_hold_every_term_once_and_every_item_where_it_is_read(pieces, size):
    whole = a_batch(pieces)
    parts = [own_part(whole, rank, size) for rank in range(size)]
    bounds = parts[0].bounds
    assert {part.bounds for part in parts} == {bounds}
    assert bounds[0] == 0
    assert all(begin < end for begin, end in itertools.pairwise(bounds))  # none has nothing to run
    length = whole.input_ids.shape[1]
    missing = bounds[-1] - length
    assert missing == 0 or bounds[-2] >= length
    assert {part.input_ids.shape[1] for part in parts} == {bounds[-1]}
    assert int(parts[0].cu_seqlens[-1]) == bounds[-1]
    trained = torch.stack([part.labels != IGNORE_INDEX for part in parts])
    assert not trained[:, :, length:].any()
    assert torch.equal(trained.sum(0)[:, :length], (whole.labels != IGNORE_INDEX).long())
    keys = []
    for rank, part in enumerate(parts):
        own = range(bounds[rank], bounds[rank + 1])
        for place in (part.labels[0] != IGNORE_INDEX).nonzero().flatten().tolist():
            assert place - 1 in own  # the state it is predicted from
        kept = slice(own.start, min(own.stop, length))
        assert torch.equal(part.input_ids[:, kept], whole.input_ids[:, kept])
        image, aims = part.media["image"], part.targets["image"]
        assert (
            part.input_ids == PICTURE
        ).flatten().nonzero().flatten().tolist() == image.slots.tolist()
        assert image.num_tokens.sum() == len(image.slots)
        assert len(image.num_tokens) == len(image.num_features) == len(image.tensors["pixels"]) > 0
        assert set(own) & set(whole.media["image"].slots.tolist()) <= set(image.slots.tolist())
        signals = (part.input_ids == SIGNAL).flatten().nonzero().flatten().tolist()
        assert signals == ([] if aims.idle else aims.slots.flatten().tolist())
        assert set(signals) <= set(own)
        keys += [] if aims.idle else aims.keys.tolist()
    assert keys == ([] if whole.targets["image"].idle else whole.targets["image"].keys.tolist())


def test_a_part_keeps_the_media_of_its_items_alone():
    whole = a_batch([("picture", 4), ("word", 2), ("picture", 3), ("picture", 6)])
    first, last = (own_part(whole, rank, 2).media["image"] for rank in range(2))
    assert first.tensors["pixels"].tolist() == [0, 1]
    assert last.tensors["pixels"].tolist() == [1, 2]  # the second stands across the bound
    assert last.num_tokens.tolist() == [3, 6]


def test_counts_are_read_on_the_host_for_a_batch_that_was_moved():
    whole = a_batch([("picture", 4), ("word", 20), ("made", 2)])
    moved = whole.to("meta")
    part = own_part(moved, 1, 2)
    assert part.input_ids.device.type == "meta"
    assert [one.media["image"].idle for one in (part, part.host)] == [True, True]
    assert part.host.bounds == part.bounds == part_bounds(whole, 2)


@pytest.mark.parametrize("aim", range(2, 10))
def test_signal_tokens_are_not_cut(aim):
    whole = a_batch([("word", aim), ("made", 2), ("word", 12 - aim)])
    bounds = part_bounds(whole, 3)
    first, last = whole.targets["image"].slots[0].tolist()
    assert not any(first < bound <= last for bound in bounds)
    assert part_bounds(replace(whole, targets={}), 3) == (0, 5, 10, 15)


def test_a_group_waits_as_long_as_the_recipe_says(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = join_group(1, timedelta(minutes=3))._group
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=3)
    finally:
        dist.destroy_process_group()
