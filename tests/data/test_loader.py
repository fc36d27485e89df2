"""Loaders: the same batches for any number of workers, micro-batches that add up, no drift."""

from __future__ import annotations

import itertools
import os
import random

import numpy as np
import pytest
import torch

from mmfusion.data.loader import Division, TrainLoader
from mmfusion.data.parcel import pack, unpack
from mmfusion.data.reader import SampleError
from mmfusion.data.workers import Workers
from tests.data.synthetic import keys_of, make_data, same_tensors, write_source


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("loader")
    return {
        "a": write_source(root / "a", 40, bad={3: "odd", 11: "corrupt_image"}),
        "b": write_source(root / "b", 9, seed=1),
    }


def loader(data, rank=0, world=1, micro=1, workers=None):
    division = Division(data.packs_per_step, micro, rank, world)
    return TrainLoader(data.state, data.sources, data.processor, division, workers or Workers())


def take(iterable, count: int) -> list:
    return list(itertools.islice(iter(iterable), count))


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param(Workers(1), id="1"),
        pytest.param(Workers(3), id="3", marks=pytest.mark.slow),
        pytest.param(Workers(2, "spawn"), id="2 spawned", marks=pytest.mark.slow),
    ],
)
def test_loader_processes_change_nothing(folders, workers):
    data = make_data(folders, {"a": 2.0})
    expected = take(loader(data, micro=2), 14)
    got = take(loader(data, micro=2, workers=workers), 14)
    assert len(got) == 14
    for one, other in zip(expected, got, strict=True):
        assert same_tensors(one, other)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("micro", [1, 3])
def test_ranks_and_micro_batches_divide_the_same_steps(folders, world, micro):
    data = make_data(folders)
    whole = take(loader(data, micro=4), 5)
    count = data.division(0, world).packs_per_step
    per_step = Division(count, micro, 0, world).micro_batches
    ranks = [take(loader(data, rank, world, micro), 5 * per_step) for rank in range(world)]
    for step in range(5):
        parts = [rank[step * per_step : (step + 1) * per_step] for rank in ranks]
        samples = [key for part in parts for batch in part for key in keys_of(batch)]
        assert sorted(samples) == sorted(keys_of(whole[step]))
        assert (
            sum(part[0].step_counts["tokens"] for part in parts)
            == whole[step].step_counts["tokens"]
        )
        for part in parts:
            labels = sum(int((batch.labels != -100).sum()) for batch in part)
            assert all(batch.step_counts["tokens"] == labels for batch in part)
            assert [batch.stream is None for batch in part] == [True] * (per_step - 1) + [False]


def test_a_step_with_too_few_packs_is_filled_with_empty_ones(folders):
    data = make_data(folders, packs_per_step=2)
    batches = [take(loader(data, rank, 3), 1)[0] for rank in range(3)]
    assert [len(batch.samples) == 0 for batch in batches].count(True) == 1


def test_iterating_again_starts_at_the_committed_state(folders):
    data = make_data(folders)
    one = loader(data, micro=4)
    first = take(one, 5)
    assert [keys_of(b) for b in take(one, 5)] == [keys_of(b) for b in first]
    data.state.commit(first[0].stream)
    data.state.commit(first[1].stream)
    assert [keys_of(b) for b in take(one, 3)] == [keys_of(b) for b in first[2:]]


def test_prefetched_steps_do_not_move_the_state(folders):
    data = make_data(folders)
    before = data.state.to_json()
    take(loader(data, workers=Workers(2)), 9)
    assert data.state.to_json() == before


def test_five_chained_resumes_lose_and_repeat_nothing(folders):
    data = make_data(folders, {"a": 3.0})
    expected = [keys_of(batch) for batch in take(loader(data, micro=4), 20)]
    got = []
    for workers in (0, 2, 0, 1, 0):
        for batch in take(loader(data, micro=4, workers=Workers(workers)), 4):
            got.append(keys_of(batch))
            data.state.commit(batch.stream)
    assert got == expected


def test_one_rank_ends_with_its_data_and_stays_at_the_end(folders):
    data = make_data(folders, epochs=1)
    one = loader(data)
    seen = []
    for batch in one:
        seen += keys_of(batch)
        if batch.stream is not None:
            data.state.commit(batch.stream)
    assert len(seen) == len(set(seen)) == 47
    assert list(one) == []


def test_samples_carry_their_shard_and_key(folders):
    batch = take(loader(make_data(folders)), 1)[0]
    for sample in batch.samples:
        assert sample.key == f"{sample.ref.index:05d}"
        assert f"/{sample.ref.source}/" in sample.shard


def test_a_crash_in_a_worker_reaches_the_main_process_with_the_sample(tmp_path):
    data = make_data({"s": write_source(tmp_path / "s", 10, bad={3: "crash"})})
    with pytest.raises(SampleError, match=r"sample 3 of source 's'"):
        take(loader(data, workers=Workers(1)), 50)


def test_a_step_of_many_micro_batches_needs_few_open_files(folders):
    data = make_data(folders, packs_per_step=24)
    batches = iter(loader(data, workers=Workers(1)))
    before = len(os.listdir("/proc/self/fd"))
    most = max(len(os.listdir("/proc/self/fd")) for _ in itertools.islice(batches, 72))
    assert most - before < 30


def test_global_generators_have_no_say(folders):
    def rows(seed: int) -> list:
        np.random.seed(seed)
        torch.manual_seed(seed)
        random.seed(seed)
        return take(loader(make_data(folders), micro=4), 4)

    assert all(same_tensors(a, b) for a, b in zip(rows(0), rows(1), strict=True))


def test_a_parcel_keeps_every_kind_of_tensor():
    tensors = [
        torch.arange(6).reshape(2, 3).T,
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.zeros(0, 4),
        torch.tensor([True, False]),
    ]
    parcel = pack({"tensors": tensors, "other": (1, "x")})
    got = unpack(parcel)
    assert got["other"] == (1, "x")
    memory = parcel.block.untyped_storage().data_ptr()
    for one, other in zip(tensors, got["tensors"], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert other.untyped_storage().data_ptr() == memory  # pinned memory is kept by storage
