"""Tars for the tests, made with Python's tarfile, and what webdataset reads from them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import webdataset


def make_tar(
    path: Path, files: Iterable[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample_files(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Two files a sample, with sizes around the tar block's."""
    files = []
    for number in range(first, first + count):
        files.append((f"s{number:05d}.jpg", bytes([number % 256]) * (500 + number * 7 % 1600)))
        files.append((f"s{number:05d}.txt", f"caption {number}".encode()))
    return files


def read_with_webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """(key, record) of each sample, without decoding."""
    samples: list[Mapping[str, Any]] = list(
        webdataset.WebDataset([str(path)], shardshuffle=False, empty_check=False)
    )
    return [
        (s["__key__"], {name: content for name, content in s.items() if name[:2] != "__"})
        for s in samples
    ]


def offsets_with_tarfile(path: Path) -> list[int]:
    """What Energon's index holds: where tarfile sees each new key start, and the end."""
    offsets, last = [], None
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isreg() and not member.name.startswith("__"):
                folder, _, base = member.name.rpartition("/")
                key = (folder, base.split(".")[0])
                if key != last:
                    offsets.append(member.offset)
                    last = key
        return [*offsets, tar.offset]
