from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from mmfusion.data.tar import BLOCK, Members, TarError, parse_header, split_name
from tests.data.tars import make_tar


def read_members(path: Path) -> list[tuple[str, int, int, int]]:
    content = path.read_bytes()
    members = Members(lambda offset, length: content[offset : offset + length], len(content))
    return [(m.name, m.start, m.data, m.size) for m in members]


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_members_equal_those_of_tarfile(tmp_path: Path, tar_format: int) -> None:
    files = [
        ("a.jpg", b"x" * 1000),
        ("folder/" + "n" * 95 + ".txt", b""),
        ("deep/" * 30 + "b.json", b"{}"),
        ("b.wav", b"y" * 512),
    ]
    if tar_format != tarfile.USTAR_FORMAT:
        files += [("k" * 300 + ".txt", b"long"), ("größe.txt", b"umlaut"), ("字" * 90 + ".t", b"")]
    path = make_tar(tmp_path / "a.tar", files, tar_format)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset, m.offset_data, m.size) for m in tar]
    assert [m[0] for m in expected] == [name for name, _ in files]
    assert read_members(path) == expected


def test_base_256_sizes_are_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("big.bin")
    info.size = 9 << 30
    header = info.tobuf(tarfile.GNU_FORMAT)
    assert header[124] & 0x80
    assert parse_header(header, 0)[2] == 9 << 30


def test_pax_size_of_a_huge_member_is_read() -> None:
    info = tarfile.TarInfo("big.bin")
    info.size = 9 << 30
    headers = info.tobuf(tarfile.PAX_FORMAT)
    stop = len(headers) + info.size
    members = list(Members(lambda o, n: headers[o : o + n], stop))
    assert [(m.name, m.size) for m in members] == [("big.bin", 9 << 30)]


def test_signed_checksums_of_old_writers_are_accepted() -> None:
    header = bytearray(tarfile.TarInfo("grün.txt").tobuf(tarfile.GNU_FORMAT))
    blank = header[:148] + b" " * 8 + header[156:]
    signed = sum(byte - 256 if byte > 127 else byte for byte in blank)
    header[148:156] = b"%06o\0 " % signed
    assert parse_header(bytes(header), 0)[1] == "grün.txt".encode()


@given(st.integers(0, BLOCK - 1), st.integers(1, 255))
def test_any_flipped_header_byte_is_refused(position: int, flip: int) -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
    before = bytes(header)
    header[position] ^= flip
    if position in range(148, 156):  # the checksum itself: its digits may only be written otherwise
        try:
            assert parse_header(bytes(header), 0) == parse_header(before, 0)
        except TarError:
            return
    else:
        with pytest.raises(TarError):
            parse_header(bytes(header), 0)


@given(st.text(st.sampled_from("ab./_J\n"), max_size=12))
def test_names_split_as_in_webdataset(name: str) -> None:
    key, extension = base_plus_ext(name)
    assert split_name(name) == (None if key is None else (key, extension.lower()))


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(records)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header + records + bytes(-len(records) % BLOCK)


FILE = tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (pax(b"999 path=x\n") + FILE, "damaged pax header"),
        (pax(b"no record\n") + FILE, "damaged pax header"),
        (pax(b"11 path=\xff\xfe\n") + FILE, "not UTF-8"),
        (pax(b"11 size=-1\n") + FILE, "not a number"),
        (pax(b"22 GNU.sparse.major=1\n") + FILE, "sparse"),
        (pax(b"11 path=aa\n", b"g") + FILE, "global pax header"),
        (pax(b"11 path=aa\n"), "without a member after it"),
        (pax(b"11 path=aa\n") + bytes(BLOCK), "without a member after it"),
        (FILE[:300], "truncated in a header"),
    ],
)
def test_damaged_extended_headers_are_refused(content: bytes, problem: str) -> None:
    with pytest.raises(TarError, match=problem):
        list(Members(lambda o, n: content[o : o + n], len(content)))


def test_global_comments_and_other_pax_records_are_passed_over() -> None:
    content = pax(b"17 comment=abc\xff\xff\n", b"g") + pax(b"11 mtime=1\n") + FILE
    (member,) = Members(lambda o, n: content[o : o + n], len(content))
    assert (member.name, member.start, member.size) == ("a.jpg", 1024, 0)
