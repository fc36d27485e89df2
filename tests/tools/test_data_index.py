from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmfusion.data.index import ShardError, index_path, load_index, scan
from mmfusion.data.shards import Shards
from mmfusion.tools.data_index import index
from tests.data.tars import make_tar, sample_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    for number, count in enumerate((3, 0, 6)):
        make_tar(tmp_path / "set" / f"a-{number}.tar", sample_files(count, number * 10))
    return tmp_path / "set"


def test_indexes_are_written_then_verified(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index(str(folder))
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert capsys.readouterr().out == (
        f"9 samples, {size:,} bytes in 3 shards; indexes: 3 written, 0 replaced, 0 verified\n"
    )
    assert Shards(str(folder)).counts == [3, 0, 6]
    dates = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    index(f"{folder}/a-{{0..2}}.tar")
    assert "0 written, 0 replaced, 3 verified" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == dates


def test_command_line_takes_the_arguments_that_errors_name(folder: Path) -> None:
    shard = folder / "a-2.tar"
    run = [sys.executable, "-m", "mmfusion", "data", "index", str(shard)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(" bytes")[0]) == (0, "6 samples, 20,480"), (
        done.stderr
    )
    make_tar(shard, sample_files(2))
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"mmfusion data index {shard} --force true" in done.stderr
    done = subprocess.run([*run, "--force", "true"], capture_output=True, text=True)
    assert (done.returncode, done.stdout[:9]) == (0, "2 samples"), done.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_problems_are_listed_after_the_good_shards_are_done(
    folder: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    cut = folder / "a-0.tar"
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(ShardError, match=r"1 of 3 shards are not in order:\n.*a-0.tar: truncated"):
        index(str(folder), workers=workers)
    assert "6 samples" in capsys.readouterr().out
    assert sorted(path.name for path in folder.glob("*.idx")) == ["a-1.tar.idx", "a-2.tar.idx"]


def test_index_of_another_state_is_left_alone_without_force(folder: Path) -> None:
    index(str(folder))
    shard = str(folder / "a-2.tar")
    before = Path(index_path(shard)).read_bytes()
    make_tar(Path(shard), sample_files(2))
    with pytest.raises(
        ShardError, match=f"holds 2 samples.*mmfusion data index {shard} --force true"
    ):
        index(str(folder))
    assert Path(index_path(shard)).read_bytes() == before
    index(shard, force=True)
    assert load_index(shard).tolist() == scan(shard).tolist()


def test_foreign_side_file_is_replaced_with_force_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    side = folder / "a-0.tar.idx"
    side.write_text("my notes")
    with pytest.raises(ShardError, match=r"a-0.tar.idx \(8 bytes\)"):
        index(str(folder))
    assert side.read_text() == "my notes"
    index(str(folder), force=True)
    assert "0 written, 1 replaced, 2 verified" in capsys.readouterr().out


def test_verified_index_becomes_newer_than_its_shard(folder: Path) -> None:
    index(str(folder))
    shard = folder / "a-0.tar"
    os.utime(index_path(str(shard)), (time.time() - 3600,) * 2)
    index(str(folder))
    assert os.stat(index_path(str(shard))).st_mtime_ns >= shard.stat().st_mtime_ns
