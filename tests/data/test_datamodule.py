"""The `data:` section: what it refuses, and what it tells."""

from __future__ import annotations

import pytest

from mmfusion.data.datamodule import MultimodalData
from mmfusion.data.source import Source
from tests.data.synthetic import Words, make_data, write_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> dict[str, str]:
    return {"a": write_source(tmp_path_factory.mktemp("module") / "a", 20)}


@pytest.mark.parametrize(
    ("packs", "micro", "world", "expected"),
    [
        (8, 1, 1, 8),
        (8, 1, 2, 4),
        (8, 2, 2, 2),
        (8, 3, 2, 2),
        (3, 1, 2, 2),
        (1, 1, 4, 1),
        (5, 9, 1, 1),
    ],
)
def test_micro_batches_of_a_step(folder, packs, micro, world, expected):
    data = make_data(folder, packs_per_step=packs, packs_per_micro_batch=micro)
    assert data.micro_batches_per_step(world) == expected


@pytest.mark.parametrize(
    "name", ["packs_per_step", "packs_per_micro_batch", "lanes", "window", "block", "pack_tokens"]
)
def test_sizes_below_one_are_named(folder, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        _ = make_data(folder, **{name: 0}).state


def test_a_budget_for_an_unknown_modality_is_refused(folder):
    with pytest.raises(ValueError, match=r"limits \['smell'\].*\['image'\]"):
        _ = make_data(folder, pack_media={"smell": 3}).state


def test_no_sources_and_no_processor_are_refused(folder):
    with pytest.raises(ValueError, match="name at least one source"):
        MultimodalData({})
    data = MultimodalData({"a": Source(folder["a"], Words())})
    with pytest.raises(ValueError, match=r"call data\.attach"):
        data.train_dataloader()


def test_building_the_module_opens_no_shard():
    data = MultimodalData({"a": Source("/nowhere/*.tar", Words())})
    assert data.micro_batches_per_step(2) == 4


def test_an_empty_shard_among_others_changes_nothing_but_the_name(tmp_path):
    import tarfile

    write_source(tmp_path / "s", 14)
    whole = make_data({"a": str(tmp_path / "s")}, epochs=1)
    before = [b.samples for b in whole.train_dataloader()]
    tarfile.open(tmp_path / "s" / "part-0000a.tar", "w").close()
    from mmfusion.data.index import scan, write_index

    path = str(tmp_path / "s" / "part-0000a.tar")
    write_index(path, scan(path))
    again = make_data({"a": str(tmp_path / "s")}, epochs=1)
    assert [b.samples for b in again.train_dataloader()] == before
    assert again.state.spec.differences(whole.state.spec)


def test_validation_is_empty_without_sources_and_made_once_with_them(folder):
    data = make_data(folder)
    assert data.val_dataloader() == []
    data.val_sources = data.sources
    loader = data.val_dataloader()
    assert loader is data.val_dataloader()
    assert len(list(loader)) == len(loader) > 0
