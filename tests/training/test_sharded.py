"""Shares of tensors, written by some ranks and read back by any."""

from __future__ import annotations

import errno
import json
import resource
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mmfusion.training.checkpoint import REQUIRED_KEYS, AtomicCheckpointIO
from mmfusion.training.sharded import PLACES, Part, Share, Shares, joined, read, split, write

WEIGHT = torch.arange(35.0).reshape(7, 5)


def checkpoint() -> dict[str, object]:
    state = {0: {"step": torch.tensor(3.0), "exp_avg": WEIGHT * 2}, 1: {"step": torch.tensor(3.0)}}
    return {
        "global_step": 3,
        "state_dict": {"a": WEIGHT, "half": WEIGHT[:1].bfloat16(), "number": torch.tensor(2.0)},
        "optimizer_states": [{"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}],
    }


@pytest.mark.parametrize("world", [1, 2, 3, 50])
def test_what_was_split_is_joined(tmp_path, world):
    for rank in range(world):
        rest, shares = split(checkpoint(), rank, world)
        write(tmp_path, rank, shares)
    assert not any(isinstance(value, torch.Tensor) for value in rest["state_dict"].values())
    found = read(joined(tmp_path, rest))
    wanted = checkpoint()
    torch.testing.assert_close(found["state_dict"], wanted["state_dict"], atol=0, rtol=0)
    (one,), (two,) = found["optimizer_states"], wanted["optimizer_states"]
    torch.testing.assert_close(one["state"], two["state"], atol=0, rtol=0)
    assert found["global_step"] == 3
    assert set(found) == set(wanted)
    meta = joined(tmp_path / "nowhere", rest, numbers=False)
    assert meta["state_dict"]["half"].shape == (1, 5)
    assert meta["state_dict"]["half"].dtype == torch.bfloat16


def test_a_part_is_written_without_its_padding(tmp_path):
    padded = torch.cat([WEIGHT.flatten(), torch.full((5,), -1.0)])
    for rank in (0, 1):
        part = Part((7, 5), 20 * rank, padded[20 * rank : 20 * rank + 20])
        given = checkpoint() | {"state_dict": {"a": part}}
        rest, shares = split(given, rank, 2)
        write(tmp_path, rank, shares)
    assert joined(tmp_path, rest)["state_dict"]["a"].equal(WEIGHT)


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 40), st.integers(0, 40))
def test_any_numbers_are_read_from_any_cuts(tmp_path_factory, cuts, start, stop):
    folder = tmp_path_factory.mktemp("cuts")
    row, edges = torch.arange(40), [0, *sorted(cuts), 40]
    for rank, (begins, ends) in enumerate(pairwise(edges)):
        write(folder, rank, [Share("row", begins, row[begins:ends])])
    if start < stop:
        assert Shares(folder).read("row", start, stop).equal(row[start:stop])


def test_numbers_that_no_rank_wrote_are_missed(tmp_path):
    write(tmp_path, 0, [Share("row", 0, torch.arange(5))])
    write(tmp_path, 2, [Share("row", 8, torch.arange(5))])
    shares = Shares(tmp_path)
    with pytest.raises(ValueError, match="shares of row end at 5, expected numbers up to 9"):
        shares.read("row", 2, 9)
    with pytest.raises(ValueError, match="shares of column end at 0"):
        shares.read("column", 0, 1)


@pytest.mark.parametrize(
    "places", [None, "no json", json.dumps({"other": 0}), json.dumps({"row": "x"}), "[1]"]
)
def test_files_of_others_are_refused(tmp_path: Path, places):
    name = tmp_path / "rank-00000.safetensors"
    save_file({"row": torch.arange(3)}, name, metadata={PLACES: places} if places else None)
    with pytest.raises(ValueError, match="holds no shares of a checkpoint"):
        Shares(tmp_path)
    name.write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(ValueError, match="holds no shares of a checkpoint"):
        Shares(tmp_path)


def test_a_full_disk_is_an_error_of_the_system_that_names_the_file(tmp_path: Path):
    """Which the other ranks are told; here the disk is full after 100 bytes."""
    given = {**dict.fromkeys(REQUIRED_KEYS), **checkpoint()}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="rank-00001") as one:
            AtomicCheckpointIO().save_shards(given, tmp_path / "a", 1, 2).result()
        rest = {**given, "state_dict": {}, "optimizer_states": [{"state": {}, "param_groups": []}]}
        with pytest.raises(OSError, match=r"rest\.ckpt") as two:
            AtomicCheckpointIO().save_shards(rest, tmp_path / "b", 0, 2).result()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert one.value.errno == two.value.errno == errno.EFBIG
