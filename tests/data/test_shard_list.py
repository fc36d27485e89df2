from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmfusion.data.index import ShardError
from mmfusion.data.shard_list import find_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(4):
        for suffix in ("tar", "tar.idx"):
            (folder / f"train-{number:02d}.{suffix}").touch()
    return folder


def test_folders_globs_brace_lists_and_lists_name_shards(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(folder / f"train-{i:02d}.tar") for i in range(4)]
    monkeypatch.setenv("MY_DATA", str(folder))
    assert find_shards(str(folder)) == names
    assert find_shards(str(folder.parent)) == names
    assert find_shards(f"{folder}/train-*.tar") == names
    assert find_shards(f"{folder}/*") == names
    assert find_shards(f"{folder}/train-{{00..03}}.tar") == names
    assert find_shards(f"{folder}/train-{{02,00}}.tar") == [names[2], names[0]]
    assert find_shards("$MY_DATA/train-*.tar") == names
    assert find_shards([names[3], f"{folder}/train-00.*"]) == [names[3], names[0]]


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("{}/train-{{00..04}}.tar", r"no shard '.*train-04.tar' \(from"),
        ("{}/val-*.tar", "no shard"),
        ("{}/val.tar", "no shard"),
        ("{}/*.idx", "holds no .tar file"),
        ("pipe:cat {}/train-00.tar", "not addresses or pipes"),
        ("https://example.org/a.tar", "not addresses or pipes"),
    ],
)
def test_patterns_that_miss_a_shard_are_refused(folder: Path, pattern: str, problem: str) -> None:
    with pytest.raises(ShardError, match=problem):
        find_shards(pattern.format(folder))


def test_compressed_shards_beside_plain_ones_are_not_passed_over(folder: Path) -> None:
    (folder / "train-04.tar.gz").write_bytes(b"")
    with pytest.raises(ShardError, match="decompress"):
        find_shards(str(folder))


def test_shard_named_twice_is_refused(folder: Path) -> None:
    with pytest.raises(ShardError, match="named 2 times"):
        find_shards([str(folder), f"{folder}/train-03.tar"])


def test_no_patterns_and_missing_variable_are_refused() -> None:
    with pytest.raises(ShardError, match="no shards are named"):
        find_shards([])
    with pytest.raises(ValueError, match="environment variable"):
        find_shards("$MMFUSION_NO_SUCH_VARIABLE/a.tar")


def test_what_is_no_regular_file_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "train-04.tar")
    with pytest.raises(ShardError, match=r"train-04.tar is no regular file"):
        find_shards(str(folder))
