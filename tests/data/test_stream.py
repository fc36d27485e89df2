"""The stream: the same packs at every step for any ranks, micro-batches, restarts."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfusion.data import reader
from mmfusion.data.reader import SampleError
from mmfusion.data.shards import Shards
from mmfusion.data.state import LeftOut, StepRecord, StreamState
from mmfusion.data.stream import Stream, exhausted, packs_of_rank
from tests.data.synthetic import keys_of, make_data, write_source


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("stream")
    bad = dict.fromkeys(range(0, 60, 9), "too_odd") | dict.fromkeys(
        range(4, 60, 13), "corrupt_image"
    )
    return {
        "mixed": write_source(root / "mixed", 60, bad=bad),
        "one": write_source(root / "one", 1, words=4),
        "text": write_source(root / "text", 23, seed=2, images=False),
    }


WEIGHTS = {"mixed": 3.0, "one": 0.1, "text": 1.0}


def names(pack) -> list[tuple[str, int, int]]:
    return [(s.ref.source, s.ref.epoch, s.ref.index) for s in pack]


def run_steps(data, state: StreamState, steps: int, world: int) -> tuple[dict, StreamState]:
    """Packs of some steps by their samples, driven as ``world`` ranks that gather at the end."""
    state = StreamState.from_json(json.loads(json.dumps(state.to_json())))
    streams = [Stream(state, data.sources, data.processor) for _ in range(world)]
    packs: dict[int, list] = {}
    count, first, lanes = data.packs_per_step, state.packs, state.spec.lanes
    merged = StreamState.from_json(state.to_json())
    for ahead in range(steps):
        step, start = state.step + ahead, first + ahead * count
        for rank, stream in enumerate(streams):
            local = stream.local_step(step, start, count, rank, world)
            owned = packs_of_rank(start, count, lanes, rank, world)
            packs.update(zip(owned, map(names, local.packs), strict=True))
            if rank == 0:
                merged.commit(local.record)
            else:
                merged.absorb(local.record.lanes, local.record.counts)
    return packs, merged


@pytest.mark.slow
@pytest.mark.parametrize("packs_per_step", [1, 4, 5, 9])
def test_random_restarts_on_other_ranks_give_the_packs_of_the_uninterrupted_run(
    folders, packs_per_step
):
    data = make_data(folders, WEIGHTS, packs_per_step=packs_per_step, lanes=4)
    expected, end = run_steps(data, data.state, 40, world=1)
    dice = random.Random(packs_per_step)
    packs, state = {}, data.state
    while state.step < 40:
        steps = min(dice.randint(1, 9), 40 - state.step)
        more, state = run_steps(data, state, steps, world=dice.choice([1, 2, 3, 5, 8]))
        packs.update(more)
    assert packs == expected
    assert state == end


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4))
def test_any_schedule_of_ranks_gives_the_same_state(folders, schedule):
    data = make_data(folders, WEIGHTS, lanes=3, packs_per_step=5)
    state = data.state
    for steps, world in schedule:
        _, state = run_steps(data, state, steps, world)
    _, expected = run_steps(data, data.state, sum(steps for steps, _ in schedule), 1)
    assert state == expected


def test_the_global_batch_may_grow_and_packs_go_on(folders):
    small, big = make_data(folders, packs_per_step=3), make_data(folders, packs_per_step=7)
    before, state = run_steps(small, small.state, 7, world=2)
    after, _ = run_steps(big, state, 3, world=3)
    expected, _ = run_steps(small, small.state, 14, world=1)
    assert before | after == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9))
def test_ranks_share_a_step_evenly_and_in_order_of_lanes(first, count, lanes, world):
    parts = [packs_of_rank(first, count, lanes, rank, world) for rank in range(world)]
    joined = [q for part in parts for q in part]
    assert sorted(joined) == list(range(first, first + count))
    assert [q % lanes for q in joined] == sorted(q % lanes for q in joined)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_ranks_keep_their_lanes_where_lanes_and_step_divide():
    for rank in range(4):
        lanes = {q % 8 for step in range(5) for q in packs_of_rank(step * 8, 8, 8, rank, 4)}
        assert len(lanes) == 2


@pytest.mark.parametrize("lanes", [1, 4, 128])
@pytest.mark.parametrize("world", [1, 3])
def test_epochs_see_each_good_sample_exactly_that_often(folders, lanes, world):
    data = make_data(folders, epochs=2, lanes=lanes)
    order_end = [
        Stream(data.state, data.sources, data.processor).lane_length(i) for i in range(lanes)
    ]
    packs, state = run_steps(data, data.state, 60 if lanes < 100 else 70, world)
    assert all(exhausted(order_end, state))
    seen = Counter((source, index) for pack in packs.values() for source, _, index in pack)
    broken = set(range(0, 60, 9)) | set(range(4, 60, 13))
    expected = {("one", 0): 2} | {("text", i): 2 for i in range(23)}
    expected |= {("mixed", i): 2 for i in range(60) if i not in broken}
    assert seen == expected
    corrupt = set(range(4, 60, 13))
    assert state.counts["mixed"].bad == {
        "corrupt_image": 2 * len(corrupt),
        "too_odd": 2 * len(broken - corrupt),
    }
    assert state.counts["mixed"].seen == 2 * (60 - len(broken))
    assert state.counts["one"].seen == 2


def test_packs_keep_both_budgets_and_counts_agree(folders):
    data = make_data(folders, WEIGHTS, pack_tokens=40, pack_media={"image": 12})
    stream = Stream(data.state, data.sources, data.processor)
    full = 0
    for step in range(30):
        local = stream.local_step(step, step * 4, 4)
        for pack in local.packs:
            features = sum(m.num_features for s in pack for m in s.planned.media)
            assert sum(len(s.planned) for s in pack) <= 40
            assert features <= 12
            full += features >= 8
        tokens = sum(len(s.planned) for pack in local.packs for s in pack)
        assert tokens == sum(c.tokens for c in local.record.counts.values())
    assert full > 10


@pytest.mark.parametrize("epochs", [None, 20])
def test_the_steps_of_a_small_source_hold_at_most_three_epochs(tmp_path, epochs):
    folder = {"s": write_source(tmp_path / "s", 76, words=(5, 9), images=False)}
    data = make_data(folder, window=256, block=256, epochs=epochs)
    assert data.state.spec.window == 19
    packs, _ = run_steps(data, data.state, 40, world=1)
    for step in range(40):
        epochs_seen = {epoch for q in range(4 * step, 4 * step + 4) for _, epoch, _ in packs[q]}
        assert epochs_seen
        assert max(epochs_seen) - min(epochs_seen) <= 2


def test_samples_above_a_budget_are_counted_by_what_was_exceeded(folders, tmp_path):
    folder = {"long": write_source(tmp_path / "long", 12, words=(10, 30), images=False)}
    data = make_data(folder, pack_tokens=20, epochs=1)
    stream = Stream(data.state, data.sources, data.processor)
    local = [stream.local_step(step, step * 4, 4) for step in range(10)]
    seen = sum(c.seen for step in local for c in step.record.counts.values())
    left_out = [b for step in local for b in step.record.bad]
    assert seen + len(left_out) == 12
    assert {b.reason for b in left_out} == {"too_long"}
    assert "a pack holds 20" in left_out[0].message
    assert left_out[0].shard.endswith(".tar")
    data = make_data(folders, pack_media={"image": 2}, epochs=1)
    _, state = run_steps(data, data.state, 30, 1)
    assert state.counts["mixed"].bad["too_much_media"] > 5


def test_a_source_of_bad_samples_only_ends_with_all_of_them_counted(tmp_path):
    folder = {"bad": write_source(tmp_path / "bad", 10, words=60, images=False)}
    data = make_data(folder, epochs=1, lanes=3)
    packs, state = run_steps(data, data.state, 3, world=2)
    assert not any(packs.values())
    assert state.counts["bad"].bad == {"too_long": 10}


@pytest.mark.parametrize("reason", ["corrupt_image", "odd"])
def test_half_of_the_samples_bad_is_counted_exactly_and_equally_after_resumes(tmp_path, reason):
    bad = dict.fromkeys(range(0, 80, 2), reason)
    folder = {"half": write_source(tmp_path / "half", 80, bad=bad, words=(1, 20))}
    data = make_data(folder, epochs=1)
    _, whole = run_steps(data, data.state, 40, 1)
    state = data.state
    for world in (2, 1, 3, 1, 2, 1, 4, 1):
        _, state = run_steps(data, state, 5, world)
    assert state == whole
    assert whole.counts["half"].bad == {reason: 40}
    assert whole.counts["half"].seen == 40


def test_code_errors_stop_at_once_and_name_the_sample(tmp_path):
    folder = {"s": write_source(tmp_path / "s", 10, bad={3: "crash"})}
    data = make_data(folder, epochs=1)
    with pytest.raises(SampleError, match=r"sample 3 of source 's'.*part-0000.tar.*ZeroDivision"):
        run_steps(data, data.state, 10, 1)


def test_io_errors_stop_at_once_and_name_the_sample(tmp_path, monkeypatch):
    folder = {"s": write_source(tmp_path / "s", 10)}
    data = make_data(folder, epochs=1)
    shards = data.sources["s"].shards
    shards._backoff = 0.0
    with open(tmp_path / "s" / "part-0001.tar", "r+b") as file:
        file.truncate(512)
    with pytest.raises(SampleError, match=r"source 's'.*part-0001.tar"):
        run_steps(data, data.state, 10, 1)


@pytest.mark.parametrize(("kept", "reads"), [(reader.KEPT_BYTES, 1), (0, 2)])
def test_a_planned_sample_is_not_read_again_while_there_is_room(folders, monkeypatch, kept, reads):
    data = make_data({"text": folders["text"]}, epochs=1)
    read, count = Shards.read, Counter()
    monkeypatch.setattr(reader, "KEPT_BYTES", kept)
    monkeypatch.setattr(Shards, "read", lambda self, i: count.update([i]) or read(self, i))
    stream = Stream(data.state, data.sources, data.processor)
    seen = [name for step in range(9) for pack in stream.local_step(step, 4 * step, 4).packs
            for name in names(pack)]  # fmt: skip
    assert len(seen) == len(set(seen)) == 23
    assert set(count.values()) == {reads}
    assert stream._reader._room == kept  # nothing is held for good


def test_random_numbers_of_a_sample_do_not_depend_on_ranks_and_differ_by_epoch(tmp_path):
    folder = {"s": write_source(tmp_path / "s", 9)}
    data = make_data(folder, epochs=2)

    def rows(world: int) -> dict:
        found = {}
        for rank in range(world):
            stream = Stream(data.state, data.sources, data.processor)
            for step in range(6):
                for pack in stream.local_step(step, step * 4, 4, rank, world).packs:
                    for s in pack:
                        if s.tensors:
                            found[s.ref.epoch, s.ref.index] = s.tensors[0]["rows"]
        return found

    one, three = rows(1), rows(3)
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)
    assert not torch.equal(one[0, 0], one[1, 0])


def test_a_state_survives_json(folders):
    data = make_data(folders, WEIGHTS, pack_media={"image": 30})
    _, state = run_steps(data, data.state, 7, 2)
    assert StreamState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert len(json.dumps(state.to_json())) < 3000


def test_a_record_that_does_not_continue_the_state_is_refused(folders):
    data = make_data(folders)
    stream = Stream(data.state, data.sources, data.processor)
    later = stream.local_step(3, 12, 4).record
    with pytest.raises(RuntimeError, match=r"belongs to step 3 \(pack 12\), expected step 0"):
        data.state.commit(later)


def planned(draw: random.Random, steps: int, count: int) -> tuple[list[list[int]], list[LeftOut]]:
    """Packs of each step where some are left out, one after another."""
    packs, left_out, q = [], [], 0
    for step in range(steps):
        for _ in range(draw.choice([0, 0, 0, 1, 2])):
            size = draw.randrange(1, 20)
            left_out.append(LeftOut(step, step + 3, q, q + size, "as drawn"))
            q += size
        packs.append([*range(q, q + count)])
        q += count
    return packs, left_out


@pytest.mark.parametrize("seed", range(20))
def test_packs_left_out_are_in_no_step(folders, seed):
    """From any step on, whatever of them the state knows already."""
    draw, count = random.Random(seed), 4
    expected, left_out = planned(draw, 20, count)
    state = make_data(folders).state
    assert state.leave_out(left_out, count) == []
    for step, packs in enumerate(expected):
        assert state.first_pack(step, count) == state.packs == packs[0]
        for later in range(step, len(expected)):
            assert state.first_pack(later, count) == expected[later][0]
        state.commit(StepRecord(step, packs[0], packs[-1] + 1, {}, {}, []))
        if draw.random() < 0.4:
            state = StreamState.from_json(json.loads(json.dumps(state.to_json())))
            assert all(known.step <= state.step for known in state.left_out)
            if draw.random() < 0.5:  # a list that is older than the state, too
                assert state.leave_out([x for x in left_out if x.step <= step], count) == []
            assert state.leave_out(left_out, count) == []
    assert list(state.left_out) == left_out


def test_what_another_history_left_out_is_not_left_out(folders):
    state = make_data(folders).state
    mine, other = LeftOut(2, 4, 8, 20, "mine"), LeftOut(3, 5, 12, 16, "without mine")
    state.leave_out([mine], 4)
    state.commit(StepRecord(0, 0, 4, {}, {}, []))
    later = LeftOut(3, 5, 24, 28, "with mine")
    assert state.leave_out([LeftOut(0, 1, 0, 8, "gone past"), other, later], 4) == [
        LeftOut(0, 1, 0, 8, "gone past"),
        other,
    ]
    assert state.left_out == (mine, later)
    assert [state.first_pack(step, 4) for step in (1, 2, 3, 4)] == [4, 20, 28, 32]
    saved = StreamState.from_json(state.to_json())
    assert saved.left_out == ()
    del (old := state.to_json())["left_out"]  # as before there was such a list
    assert StreamState.from_json(old) == saved


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_behind_what_is_left_out(folders, workers):
    """Lanes are not all asked for in a step: they go through what is left out when they are."""
    how = {"lanes": 8, "packs_per_micro_batch": 4, "num_workers": workers}
    whole = make_data(folders, WEIGHTS, **how)
    batches = [keys_of(b) for b, _ in zip(whole.train_dataloader(), range(12), strict=False)]
    data = make_data(folders, WEIGHTS, **how)
    data.leave_out([LeftOut(1, 3, 4, 16, "a"), LeftOut(4, 4, 28, 32, "b")])
    found = []
    for batch, _ in zip(data.train_dataloader(), range(8), strict=False):
        data.state.commit(batch.stream)
        found.append(keys_of(batch))
    assert found == [batches[step] for step in (0, 4, 5, 6, 8, 9, 10, 11)]
    assert data.state.packs == 48
