from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import resource
import shutil
import threading
from pathlib import Path

import pytest

from mmfusion.data.index import ShardError, index_path, scan, write_index
from mmfusion.data.shards import ShardReadError, Shards
from mmfusion.types import DataError
from tests.data.tars import make_tar, read_with_webdataset, sample_files


def make_shard(path: Path, count: int, first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    make_tar(path, sample_files(count, first))
    write_index(str(path), scan(str(path)))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of 5, 0, 1 and 7 samples."""
    first = 0
    for number, count in enumerate((5, 0, 1, 7)):
        make_shard(tmp_path / "set" / f"train-{number:02d}.tar", count, first)
        first += count
    return tmp_path / "set"


def open_quickly(patterns: str | list[str], **options: int) -> Shards:
    return Shards(patterns, retries=2, backoff=0.001, **options)


def test_samples_are_those_of_webdataset_in_the_order_of_the_shards(folder: Path) -> None:
    shards = Shards(str(folder))
    expected = [
        (record, str(path), key)
        for path in sorted(folder.glob("*.tar"))
        for key, record in read_with_webdataset(path)
    ]
    assert shards.counts == [5, 0, 1, 7]
    assert len(shards) == 13
    assert [shards.read(i) for i in range(len(shards))] == expected
    assert [shards.read(i) for i in reversed(range(13))] == expected[::-1]
    assert shards.locate(6) == (str(folder / "train-03.tar"), 0)


@pytest.mark.parametrize("i", [-1, 13, 10**12])
def test_sample_numbers_outside_the_source_are_refused(folder: Path, i: int) -> None:
    with pytest.raises(IndexError, match="13 samples"):
        Shards(str(folder)).read(i)


def test_extensions_come_in_lower_case_and_meta_members_are_left_out(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "a.tar",
        [("__m__", b""), ("x/a.JPG", b"1"), ("__m__", b""), ("x/a.0.Png", b"2"), ("x/b.txt", b"3")],
    )
    write_index(str(path), scan(str(path)))
    shards = Shards(str(path))
    assert shards.read(0) == ({"jpg": b"1", "0.png": b"2"}, str(path), "x/a")
    assert shards.read(1) == ({"txt": b"3"}, str(path), "x/b")


def test_one_read_per_sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(str(folder))
    shards.read(0)
    calls = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *a: calls.append(a) or pread(*a))
    shards.read(1)
    assert len(calls) == 1


def test_missing_index_is_refused_with_the_command_that_makes_it(folder: Path) -> None:
    shard = folder / "train-02.tar"
    os.unlink(index_path(str(shard)))
    with pytest.raises(ShardError, match=f"mmfusion data index {shard}"):
        Shards(str(folder))


def test_changed_shard_is_refused_until_it_is_indexed_again(folder: Path) -> None:
    shard = folder / "train-03.tar"
    make_tar(shard, sample_files(9))
    with pytest.raises(ShardError, match="--force"):
        Shards(str(folder))
    write_index(str(shard), scan(str(shard)))
    assert len(Shards(str(folder))) == 15


def test_dataset_id_names_content_and_order_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    original = Shards(str(folder)).dataset_id
    shutil.copytree(folder, tmp_path / "copy")
    assert Shards(str(tmp_path / "copy")).dataset_id == original
    names = [f"{folder}/train-{i:02d}.tar" for i in range(4)]
    others = {
        Shards(names[:3]).dataset_id,
        Shards(names[::-1]).dataset_id,
        Shards(names[:1]).dataset_id,
    }
    shutil.copytree(folder, tmp_path / "renamed")
    for suffix in ("tar", "tar.idx"):
        os.rename(tmp_path / f"renamed/train-03.{suffix}", tmp_path / f"renamed/train-04.{suffix}")
    others.add(Shards(str(tmp_path / "renamed")).dataset_id)
    make_shard(folder / "train-03.tar", 7, first=100)  # same name, size and count
    others.add(Shards(str(folder)).dataset_id)
    assert len(others | {original}) == 6


def test_larger_record_than_allowed_is_a_data_error(folder: Path) -> None:
    shards = open_quickly(str(folder), max_record_bytes=2048)
    sizes = [len(record["jpg"]) for record, _, _ in map(Shards(str(folder)).read, range(13))]
    for i, size in enumerate(sizes):
        if 512 * 3 + -(-size // 512) * 512 > 2048:
            with pytest.raises(DataError, match="at most 2048") as caught:
                shards.read(i)
            assert caught.value.reason == "record_too_large"
        else:
            shards.read(i)


def test_io_errors_are_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = open_quickly(str(folder))
    failures = [errno.EIO, errno.ESTALE]
    pread = os.pread

    def failing(*arguments: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "no luck")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", failing)
    assert shards.read(0)[2] == "s00000"
    assert not failures


def test_lasting_io_error_is_raised_and_names_the_shard(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_quickly(str(folder))
    calls = []

    def failing(*arguments: int) -> bytes:
        calls.append(arguments)
        raise OSError(errno.EIO, "no luck")

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(
        ShardReadError, match=r"sample 1 of .*train-00.tar .* 3 attempts: .*no luck"
    ):
        shards.read(1)
    assert len(calls) == 3


def test_shard_that_is_back_before_the_retries_end_is_read(folder: Path) -> None:
    shards = Shards(str(folder), retries=4, backoff=0.05)
    shard = folder / "train-00.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:1000])
    timer = threading.Timer(0.1, shard.write_bytes, [content])
    timer.start()
    assert shards.read(0)[2] == "s00000"
    timer.join()


@pytest.mark.parametrize("change", ["removed", "cut", "replaced", "header flipped"])
@pytest.mark.parametrize("opened", [False, True])
def test_shard_that_changes_during_a_run_stops_it(folder: Path, change: str, opened: bool) -> None:
    shards = open_quickly(str(folder))
    if opened:
        shards.read(1)
    shard = folder / "train-00.tar"
    content = bytearray(shard.read_bytes())
    start = int(scan(str(shard))[2])
    if change == "removed":
        shard.unlink()
        if opened:  # an open file lives on
            assert shards.read(2)[2] == "s00002"
            return
    elif change == "cut":
        os.truncate(shard, start)
    elif change == "replaced":
        files = sample_files(5)
        replaced = make_tar(folder / "x", [*files[:2], *files[4:6], *files[2:4], *files[6:]])
        shard.write_bytes(replaced.read_bytes())
    else:
        content[start + 3] ^= 1
        shard.write_bytes(content)
    with pytest.raises(ShardReadError, match=r"train-00.tar"):
        shards.read(2)


def read_all(shards: Shards) -> list[str]:
    return [shards.read(i)[2] for i in range(len(shards))]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_samples_read_the_same_in_other_processes(folder: Path, method: str) -> None:
    shards = Shards(str(folder))
    expected = read_all(shards)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_all, [shards] * 3) == [expected] * 3
    assert read_all(shards) == expected


def test_pickled_shards_are_small_and_read_on(folder: Path) -> None:
    shards = Shards(str(folder))
    shards.read(0)
    again = pickle.loads(pickle.dumps(shards))  # noqa: S301
    assert again.dataset_id == shards.dataset_id
    assert again.read(12) == shards.read(12)


def test_child_after_fork_does_not_close_the_parents_files(folder: Path) -> None:
    shards = Shards(str(folder))
    read_all(shards)
    child = os.fork()
    if child == 0:
        os._exit(0 if read_all(shards)[0] == "s00000" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(read_all(shards)) == 13


def test_threads_read_right_while_shards_are_closed_around_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmfusion.data.shards._OPEN_SHARDS", 1)
    shards = Shards(str(folder))
    expected = [shards.read(i) for i in range(13)]
    wrong = []

    def work(step: int) -> None:
        for k in range(300):
            i = k * step % 13
            if shards.read(i) != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(step,)) for step in (1, 5, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def read_all_under_limit(shards: Shards, limit: int) -> list[str]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    order = [i * 7919 % len(shards) for i in range(len(shards))]
    return [shards.read(i)[2] for i in order]


def test_many_shards_are_read_under_a_small_limit_of_open_files(tmp_path: Path) -> None:
    first = make_shard(tmp_path / "many" / "0000.tar", 1)
    for number in range(1, 400):
        for suffix in ("", ".idx"):
            os.link(f"{first}{suffix}", first.with_name(f"{number:04d}.tar{suffix}"))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        keys = pool.apply(read_all_under_limit, (Shards(str(first.parent)), 64))
    assert keys == ["s00000"] * 400


def test_open_files_stay_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfusion.data.shards._OPEN_SHARDS", 2)
    shards = Shards(str(folder))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        read_all(shards)
    assert len(os.listdir("/proc/self/fd")) <= before + 2
