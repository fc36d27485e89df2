"""Validation: every sample once over the ranks, always the same, equal numbers of batches."""

from __future__ import annotations

import multiprocessing as mp
import socket
from collections import Counter

import pytest
import torch.distributed as dist

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


def plan_on_one_of_two(rank, port, sources, queue) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    processor, planned = make_processor(), []
    plan = processor.plan
    processor.plan = lambda sample: planned.append(sample.key) or plan(sample)
    made = ValidationBatches(sources, processor, None, Budget(40, {"image": 16}), rank, 2)
    queue.put((rank, len(planned), [keys_of(made[i]) for i in range(len(made))]))
    dist.barrier()


@pytest.mark.slow
def test_two_processes_plan_half_each_and_make_the_batches_of_one(sources):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    started = [
        context.Process(target=plan_on_one_of_two, args=(rank, port, sources, queue))
        for rank in range(2)
    ]
    for process in started:
        process.start()
    got = sorted(queue.get(timeout=200) for _ in started)
    for process in started:
        process.join(60)
    assert sum(count for _, count, _ in got) <= 30
    assert max(count for _, count, _ in got) <= 15
    assert [made for *_, made in got] == [
        [keys_of(batch) for batch in rank] for rank in batches(sources, 2)
    ]
