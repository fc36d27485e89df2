"""The manifest of a checkpoint: its files with sizes and checksums, and how it came about.

A checkpoint of several files is a folder, ``step-00000100/``; ``manifest.json`` is written into it
last, so a folder without one was not finished. A checkpoint of one file is an archive, as
``torch.save`` writes it; the manifest is one more member of it, so the file is whole by itself.
Both say the same, and are read and verified alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

from mmfusion.data.whole_file import write_whole

MANIFEST = "manifest.json"
VERSION = 1
MOST_BYTES = 1 << 26
"""A manifest is smaller."""
THREADS = 8
"""That read the files of a folder; each reads about 1 GB/s."""


@dataclass(frozen=True)
class Entry:
    """A file of a checkpoint.

    Attributes:
        bytes: its size.
        sha256: of all of it, in hexadecimal digits.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of and how it came about.

    Attributes:
        files: by name; relative to the folder, or members of the archive.
        about: ``step``, ``run``, ``recipe`` (:func:`mmfusion.training.run.fingerprint`),
            ``versions``, ``world_size``, ``strategy``, ``data`` (id of each source), ``frozen``
            (:mod:`mmfusion.training.frozen_weights`), ``weights`` (how many numbers are kept),
            ``written``.
    """

    files: dict[str, Entry]
    about: dict[str, Any]


class ManifestError(ValueError):
    """A manifest that is not there, or cannot be read."""


def entry(path: str | Path) -> Entry:
    """Of a file on disk."""
    with open(path, "rb") as file:
        return _entry(file)


def write(
    folder: str | Path, files: Iterable[str] | Mapping[str, Entry], about: Mapping[str, Any]
) -> None:
    """Finish a folder: its files are written and flushed to disk, its manifest comes last.

    Args:
        folder: of the checkpoint.
        files: their names, relative to the folder; with their entries where the ranks that wrote
            them have made these.
        about: plain values, at least the ``step``.
    """
    if not isinstance(files, Mapping):
        names = sorted(files)
        with ThreadPoolExecutor(THREADS) as threads:
            found = threads.map(entry, (Path(folder, name) for name in names))
            files = dict(zip(names, found, strict=True))
    with write_whole(str(Path(folder, MANIFEST))) as file:
        file.write(_text(files, about))


def add(file: BinaryIO, about: Mapping[str, Any]) -> None:
    """Add the manifest to an archive that ``torch.save`` has just written.

    Args:
        file: open for reading and writing.
        about: plain values.
    """
    with zipfile.ZipFile(file, "a") as archive:
        names = archive.namelist()
        entries = {}
        for name in names:
            with archive.open(name) as member:
                entries[name] = _entry(member)
        # torch.load takes members of one folder alone.
        archive.writestr(f"{names[0].partition('/')[0]}/{MANIFEST}", _text(entries, about))


def read(path: str | Path) -> Manifest | None:
    """Of a checkpoint; None where it is a file from before there were manifests.

    Raises:
        ManifestError: for a folder without one, and where it cannot be read.
        OSError: where the checkpoint cannot be read at all.
        zipfile.BadZipFile: likewise.
    """
    if Path(path).is_dir():
        try:
            with Path(path, MANIFEST).open("rb") as file:
                return parse(file.read(MOST_BYTES))
        except FileNotFoundError:
            raise ManifestError(f"has no {MANIFEST}: it was not finished") from None
    with zipfile.ZipFile(path) as archive:
        name = _member(archive)
        return None if name is None else parse(_content(archive, name))


def verify(path: str | Path) -> str | None:
    """What differs from the manifest, or None: every file is there, of its size and checksum, and
    there is no other.

    A file without a manifest is compared with the weaker checksums of its archive.
    """
    try:
        manifest = read(path)
        if Path(path).is_dir():
            assert manifest is not None
            return _verify_folder(Path(path), manifest)
        with zipfile.ZipFile(path) as archive:
            if manifest is None:
                damaged = archive.testzip()
                return f"checksum of {damaged} differs" if damaged else None
            return _verify_archive(archive, manifest)
    except ManifestError as error:
        return str(error)
    except Exception as error:  # a damaged file can raise anything: zlib's errors, KeyError, ...
        return f"cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


def _verify_folder(folder: Path, manifest: Manifest) -> str | None:
    there = {
        str(PurePosixPath(path.relative_to(folder)))
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")  # what network file systems leave
    }
    if defect := _other_names(there - {MANIFEST}, manifest):
        return defect
    for name, known in manifest.files.items():
        size = Path(folder, name).stat().st_size if Path(folder, name).is_file() else None
        if size != known.bytes:
            has = "is not there" if size is None else f"has {size:,} bytes"
            return f"{name} {has}, its manifest says {known.bytes:,} bytes"
    with ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(entry, (Path(folder, name) for name in manifest.files))
        return _first_difference(zip(manifest.files, found, strict=True), manifest)


def _verify_archive(archive: zipfile.ZipFile, manifest: Manifest) -> str | None:
    there = set(archive.namelist())
    if defect := _other_names(there - {_member(archive)}, manifest):
        return defect
    for name in manifest.files:
        if name not in there:
            return f"has no {name}, which its manifest names"
        with archive.open(name) as member:
            if defect := _first_difference([(name, _entry(member))], manifest):
                return defect
    return None


def _other_names(there: Iterable[str | None], manifest: Manifest) -> str | None:
    other = sorted(str(name) for name in there if name not in manifest.files)
    return f"holds {other[0]}, which its manifest does not name" if other else None


def _first_difference(found: Iterable[tuple[str, Entry]], manifest: Manifest) -> str | None:
    for name, one in found:
        if one != manifest.files[name]:
            return f"checksum of {name} differs from its manifest's"
    return None


def _entry(file: IO[bytes]) -> Entry:
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(1 << 22):
        digest.update(chunk)
        size += len(chunk)
    return Entry(size, digest.hexdigest())


def _member(archive: zipfile.ZipFile) -> str | None:
    """The manifest's name, if it is there: in the same folder as the rest."""
    names = archive.namelist()
    name = f"{names[0].partition('/')[0]}/{MANIFEST}" if names else ""
    return name if name in names else None


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as file:
        return file.read(MOST_BYTES)


def _text(files: Mapping[str, Entry], about: Mapping[str, Any]) -> bytes:
    listed = {name: {"bytes": one.bytes, "sha256": one.sha256} for name, one in files.items()}
    return json.dumps({"version": VERSION, **about, "files": listed}, indent=1).encode()


def parse(text: bytes) -> Manifest:
    """From a manifest's text.

    Raises:
        ManifestError: where it is none.
    """
    try:
        content = json.loads(text)
        if content.pop("version") != VERSION:
            raise ValueError("it is of another version of mmfusion")
        files = {}
        for name, one in content.pop("files").items():
            if os.path.isabs(name) or ".." in PurePosixPath(name).parts:
                raise ValueError(f"it names {name!r}")
            files[name] = Entry(int(one["bytes"]), str(one["sha256"]))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ManifestError(f"has a {MANIFEST} that cannot be used ({error})") from None
    return Manifest(files, content)
