from __future__ import annotations

import contextlib
import gzip
import io
import os
import struct
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfusion.data.index import (
    ShardError,
    check_index,
    index_path,
    load_index,
    scan,
    shard_digest,
    write_index,
)
from tests.data.tars import make_tar, offsets_with_tarfile, read_with_webdataset, sample_files

COUNT = 20


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return make_tar(tmp_path / "a.tar", sample_files(COUNT))


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_offsets_are_those_of_energon(tmp_path: Path, tar_format: int) -> None:
    long = "" if tar_format == tarfile.USTAR_FORMAT else "k" * 200
    files = [("x/" + long + name, content) for name, content in sample_files(COUNT)]
    path = make_tar(tmp_path / "a.tar", files, tar_format)
    write_index(str(path), scan(str(path)))
    stored = Path(index_path(str(path))).read_bytes()
    expected = offsets_with_tarfile(path)
    assert stored == struct.pack(f"<{COUNT + 1}Q", *expected)
    assert len(read_with_webdataset(path)) == COUNT


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.text(st.sampled_from("aä/_字-"), min_size=1, max_size=150),
            st.lists(st.sampled_from(["jpg", "TXT", "json", "0.png"]), min_size=1, unique=True),
            st.integers(0, 1100),
        ),
        max_size=6,
    )
)
def test_whatever_is_accepted_reads_the_same_in_webdataset(
    tmp_path_factory: pytest.TempPathFactory, samples: list[tuple[str, list[str], int]]
) -> None:
    path = tmp_path_factory.mktemp("t") / "a.tar"
    make_tar(
        path,
        [
            (f"{key}{number}.{extension}", bytes(size))
            for number, (key, extensions, size) in enumerate(samples)
            for extension in extensions
        ],
    )
    if any(key.startswith("__") for key, _, _ in samples):
        with pytest.raises(ShardError, match="reserved"):
            scan(str(path))
        return
    offsets = scan(str(path))
    assert len(offsets) - 1 == len(samples) == len(read_with_webdataset(path))
    assert offsets[-1] == offsets_with_tarfile(path)[-1]


def test_tar_without_samples_is_an_empty_shard(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [])
    assert scan(str(path)).tolist() == [0] == offsets_with_tarfile(path)


def test_directories_and_meta_members_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in (
            "folder/",
            "__meta__",
            "__nv__/x.json",
            "folder/a.jpg",
            "__m__",
            "folder/a.txt",
        ):
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            tar.addfile(info)
    assert len(scan(str(path))) == 2
    assert read_with_webdataset(path) == [("folder/a", {"jpg": b"", "txt": b""})]


def half(content: bytes) -> int:
    """Start of the middle sample."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return tar.getmembers()[COUNT].offset


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


CORRUPTIONS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "flipped header byte": (lambda b: flip(b, half(b) + 150), "checksum"),
    "flipped name byte": (lambda b: flip(b, half(b) + 1), "checksum does not fit"),
    "cut in a header": (lambda b: b[: half(b) + 100], "truncated in a header"),
    "cut in a member": (lambda b: b[: half(b) + 600], "truncated: 's00010.jpg' has"),
    "cut in the padding": (lambda b: b[: half(b) - 100], "truncated in the padding"),
    "cut between members": (lambda b: b[: half(b)], "no end-of-archive marker"),
    "cut in the end marker": (lambda b: b.rstrip(b"\0")[:-1].ljust(end(b) + 512, b"\0"), "end-of-"),
    "one zero block, then more": (
        lambda b: b[: half(b)] + bytes(512) + b[half(b) :],
        "a single block of zeros",
    ),
    "two tars in one": (lambda b: b + b, "several tars put together"),
    "two tars, no padding": (lambda b: b[: end(b) + 1024] + b, "several tars put together"),
    "rubbish after the end": (lambda b: b + b"\0" * 3_000_000 + b"x", "data at byte"),
    "gzip": (gzip.compress, "gzip"),
    "nothing": (lambda b: b"", "empty"),
    "no tar": (lambda b: b"hello" * 1000, "at byte 0"),
    "short text": (lambda b: b"hello", "truncated in a header"),
}


def end(content: bytes) -> int:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.getmembers()
        return tar.offset


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupt_shard_is_refused_by_name(shard: Path, name: str) -> None:
    corrupt, problem = CORRUPTIONS[name]
    shard.write_bytes(corrupt(shard.read_bytes()))
    with pytest.raises(ShardError, match=problem) as caught:
        scan(str(shard))
    assert str(shard) in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_cut_ever_shortens_a_shard(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = make_tar(tmp_path_factory.mktemp("t") / "a.tar", sample_files(3))
    content = path.read_bytes()
    keep = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(content[:keep])
    try:
        assert len(scan(str(path))) == 4
    except ShardError:
        assert keep < end(content) + 1024


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_flipped_byte_ever_changes_the_count(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = make_tar(tmp_path_factory.mktemp("t") / "a.tar", sample_files(3))
    content = path.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(flip(content, position))
    with contextlib.suppress(ShardError):
        assert len(scan(str(path))) == 4


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE, tarfile.FIFOTYPE, b"V"]
)
def test_members_without_plain_content_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "b.jpg"
        tar.addfile(info)
    with pytest.raises(ShardError, match=r"'a.jpg' is a .*not supported"):
        scan(str(path))


def test_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [("caf\udce9.jpg", b"")], tarfile.GNU_FORMAT)
    with pytest.raises(ShardError, match="not UTF-8"):
        scan(str(path))


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["a.jpg", "b.jpg", "a.txt", "b.txt"], "'a.txt': key 'a' comes again, not beside"),
        (["a.jpg", "b.jpg", "a.jpg"], "'a.jpg': key 'a' comes again"),
        (["a.jpg", "a.jpg"], "extension 'jpg' twice"),
        (["a.jpg", "a.JPG"], "extension 'jpg' twice"),
        (["img_0.5_x.jpg", "img_0.6_x.jpg", "img_0.5_x.jpg"], "extension '5_x.jpg' twice"),
        (["a", "b.txt"], "'a': no key or no extension"),
        (["x.y/a", "b.txt"], "no key or no extension"),
        ([".hidden", "b.txt"], "no key or no extension"),
        (["x/.hidden", "b.txt"], "no key or no extension"),
        (["a.", "b.txt"], "no key or no extension"),
        (["__index__.json", "a.jpg"], "reserved"),
        (["a.__key__"], "reserved"),
        (["a\x1b[2J.txt"], "control characters"),
        (["a\nERROR b.txt"], "control characters"),
    ],
)
def test_names_that_readers_would_drop_or_mix_up_are_refused(
    tmp_path: Path, names: list[str], problem: str
) -> None:
    path = make_tar(tmp_path / "a.tar", [(name, b"x") for name in names])
    with pytest.raises(ShardError) as caught:
        scan(str(path))
    assert problem in str(caught.value)


def test_same_base_name_in_two_folders_is_two_samples(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [("x/a.jpg", b""), ("y/a.jpg", b""), ("v1.0/a.b.c", b"")])
    assert len(scan(str(path))) == 4
    assert [key for key, _ in read_with_webdataset(path)] == ["x/a", "y/a", "v1.0/a"]


def test_many_bad_names_are_counted_and_the_first_listed(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [(f"file{i}", b"") for i in range(30)])
    with pytest.raises(ShardError, match=r"30 names(.|\n)*'file4'(.|\n)*and 25 more"):
        scan(str(path))


def test_missing_index_names_the_command(shard: Path) -> None:
    with pytest.raises(ShardError, match=f"is missing. Make it with: mmfusion data index {shard}$"):
        load_index(str(shard))


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 7, b"\0" * 17, b"not an index....", struct.pack("<3Q", 0, 1024, 1024),
     struct.pack("<2Q", 1024, 512), struct.pack("<2Q", 0, 1000)],
)  # fmt: skip
def test_foreign_side_file_is_refused(shard: Path, content: bytes) -> None:
    Path(index_path(str(shard))).write_bytes(content)
    with pytest.raises(ShardError, match=r"Make it again with: mmfusion data index \S+ --force"):
        load_index(str(shard))


def test_index_with_swapped_bytes_does_not_fit(shard: Path) -> None:
    Path(index_path(str(shard))).write_bytes(struct.pack(">2Q", 0, 1024))
    with pytest.raises(ShardError, match=r"samples end at 1125899906842624"):
        check_index(str(shard), load_index(str(shard)))


def test_index_that_fits_is_accepted(shard: Path) -> None:
    write_index(str(shard), scan(str(shard)))
    check_index(str(shard), load_index(str(shard)))


def test_digest_tells_captions_of_the_same_length_apart(shard: Path) -> None:
    offsets = scan(str(shard))
    before = shard_digest(str(shard), offsets)
    files = [
        (name, content.replace(b"caption", b"Caption")) for name, content in sample_files(COUNT)
    ]
    make_tar(shard, files)
    assert np.array_equal(scan(str(shard)), offsets)
    assert shard_digest(str(shard), offsets) != before


def test_an_index_that_starts_late_hides_no_sample(shard: Path) -> None:
    write_index(str(shard), scan(str(shard))[2:])
    with pytest.raises(ShardError, match="holds samples before byte"):
        check_index(str(shard), load_index(str(shard)))


@pytest.mark.parametrize(
    ("state", "newer"),
    [(state, newer) for state in ("longer", "shorter", "other", "cut") for newer in (True, False)]
    # the same ends and other borders within: without a newer date only read() notices
    + [("swapped", True)],
)
def test_index_of_another_state_of_the_shard_is_refused(
    shard: Path, state: str, newer: bool
) -> None:
    write_index(str(shard), scan(str(shard)))
    indexed = os.stat(index_path(str(shard))).st_mtime
    content = shard.read_bytes()
    if state in ("longer", "shorter"):
        make_tar(shard, sample_files(COUNT + (5 if state == "longer" else -5)))
    elif state == "other":
        make_tar(shard, [(f"t{i}.jpg", bytes(2000)) for i in range(11)])
    elif state == "cut":
        shard.write_bytes(content[: half(content)])
    else:
        files = sample_files(COUNT)
        make_tar(shard, [*files[:2], *files[4:6], *files[2:4], *files[6:]])
    moment = indexed + (60 if newer else -60)
    os.utime(shard, (moment, moment))
    with pytest.raises(ShardError, match=r"mmfusion data index \S+ --force true"):
        check_index(str(shard), load_index(str(shard)))


def test_shard_with_a_newer_date_but_the_same_samples_is_accepted(shard: Path) -> None:
    write_index(str(shard), scan(str(shard)))
    os.utime(shard, (time.time() + 60,) * 2)
    check_index(str(shard), load_index(str(shard)))


def test_index_appears_whole_or_not_at_all(shard: Path) -> None:
    write_index(str(shard), np.array([0, 512], dtype="<u8"))
    os.chmod(shard.parent, 0o755)
    write_index(str(shard), scan(str(shard)))
    assert sorted(os.listdir(shard.parent)) == ["a.tar", "a.tar.idx"]
    assert len(load_index(str(shard))) == COUNT + 1
