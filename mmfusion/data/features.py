"""A set of stored features: shards of the same samples, keys and order as a recipe's sources, with
what frozen parts made of each media item in files beside the media, or instead of them.

::

    features.json            written last: the parts, how they were made, the sources
    sources/<name>/          shards; val_sources/<name>/ likewise
    <part>.empty.safetensors a text encoder's encoding of ""

In a record, ``media.N.safetensors`` is of the N-th input item of the sample, and
``target.N.safetensors`` of its N-th target (:mod:`mmfusion.processing.stored`). The set says how it
was made: features of other weights, settings or converters are refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmfusion.data.index import ShardError
from mmfusion.data.shards import Shards
from mmfusion.data.source import Source
from mmfusion.data.whole_file import write_whole
from mmfusion.processing.stored import DTYPES, Spec, read_header
from mmfusion.types import Media, Sample

MANIFEST = "features.json"
VERSION = 2
INPUT, TARGET = "media", "target"
MEMBER = re.compile(rf"(?:{INPUT}|{TARGET})\.\d+\.safetensors")
"""Members of a record that are stored features."""

Identity = dict[str, Any]


class FeaturesError(ValueError):
    """Stored features that cannot be used by a recipe."""


@dataclass(frozen=True)
class StoredPart:
    """What was stored of a part.

    Attributes:
        identity: what made it; other features have another.
        specs: its tensors of an item.
    """

    identity: Identity
    specs: dict[str, Spec]

    @property
    def fingerprint(self) -> str:
        """A hash of the identity."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class StoredSet:
    """The shards of a source with features.

    Attributes:
        origin: ``dataset_id`` of the source that was encoded.
        contents: of each of its shards, in order, when it was last changed (nanoseconds) and a hash
            of all of it.
        converter: of the recipe.
        dataset_id: of these shards.
    """

    origin: str
    contents: list[list[Any]]
    converter: Any
    dataset_id: str = ""


@dataclass(frozen=True)
class Features:
    """A set of stored features.

    Attributes:
        parts: by name: ``encoders.image``, ``generators.image.vae``, ...
        sources: by section and name: ``sources.pictures``.
    """

    parts: dict[str, StoredPart]
    sources: dict[str, StoredSet]

    def write(self, folder: Path) -> None:
        """Write the manifest, whole or not at all."""
        with write_whole(str(folder / MANIFEST)) as file:
            file.write(json.dumps({"version": VERSION, **asdict(self)}, indent=1).encode())

    @classmethod
    def read(cls, folder: Path, command: str) -> Features:
        """Of a folder.

        Args:
            folder: that was encoded.
            command: that makes it, for errors.

        Raises:
            FeaturesError: where it is none, not complete, damaged or of another version.
        """
        try:
            content = json.loads((folder / MANIFEST).read_bytes())
        except FileNotFoundError:
            raise FeaturesError(
                f"data.features: {folder} has no {MANIFEST}: features were not made there, or not "
                f"all of them. Run: {command}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise FeaturesError(
                f"{folder / MANIFEST} is damaged ({error}). Make the features again by: {command}"
            ) from None
        try:
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}, expected {VERSION}")
            parts = {
                name: StoredPart(
                    dict(part["identity"]),
                    {n: _spec(*spec) for n, spec in part["specs"].items()},
                )
                for name, part in content["parts"].items()
            }
            return cls(parts, {n: _set(**one) for n, one in content["sources"].items()})
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise FeaturesError(
                f"{folder / MANIFEST} is damaged or of another version ({error!r}). Make the "
                f"features again by: {command}"
            ) from None


def _spec(dtype: Any, shape: Any) -> Spec:
    """As it was written.

    Raises:
        ValueError: for a type that no part gives, or what is no size.
    """
    sizes = [size for size in shape if size is not None]
    if dtype not in DTYPES or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"tensors of {dtype}, {shape}")
    return dtype, tuple(shape)


def _set(contents: Any, **given: Any) -> StoredSet:
    """As it was written.

    Raises:
        ValueError: where it does not say of each shard when it was changed, and a hash.
    """
    if any([type(value) for value in one] != [int, str] for one in contents):
        raise ValueError(f"contents {contents}")
    return StoredSet(contents=contents, **given)


class StoredSource(Source):
    """The samples of a source, their media with what is stored of them.

    Args:
        source: that was encoded: its converter and weight.
        folder: of the shards.
    """

    def __init__(self, source: Source, folder: str) -> None:
        super().__init__(folder, source.converter, source.weight)

    def __getitem__(self, index: int) -> Sample:
        """As the source's own; see the base class.

        Raises:
            DataError: also for features that cannot be read.
        """
        record, shard, key = self.shards.read(index)
        files = {name: record.pop(name) for name in list(record) if MEMBER.fullmatch(name)}
        for content in files.values():
            if member := read_header(content)[1].get("instead_of"):
                record.setdefault(member, b"")
        sample = with_stored(self.converter(record, shard, key), files)
        return replace(sample, shard=shard, key=key)


def with_stored(sample: Sample, files: Mapping[str, bytes]) -> Sample:
    """The sample, each medium with its file; an empty one where there is none."""
    names = (name for name, _ in numbered(sample))
    messages = [
        replace(
            message,
            content=tuple(
                replace(part, stored=files.get(next(names), b""))
                if isinstance(part, Media)
                else part
                for part in message.content
            ),
        )
        for message in sample.messages
    ]
    return replace(sample, messages=tuple(messages))


def numbered(sample: Sample) -> Iterator[tuple[str, Media]]:
    """(member, medium) of each medium of a sample, in reading order."""
    counts = {INPUT: 0, TARGET: 0}
    for message in sample.messages:
        kind = TARGET if message.role == "assistant" else INPUT
        for part in message.content:
            if isinstance(part, Media):
                yield f"{kind}.{counts[kind]}.safetensors", part
                counts[kind] += 1


def shards_of(folder: Path, name: str) -> Path:
    """Where the shards of a source (``sources.pictures``) are."""
    return folder / name.replace(".", "/", 1)


def stored_source(
    features: Features, folder: Path, name: str, source: Source, converter: Any, command: str
) -> StoredSource:
    """The stored samples in place of a recipe's source.

    Args:
        features: of ``folder``.
        folder: of the set.
        name: section and name: ``sources.pictures``.
        source: of the recipe.
        converter: of the recipe, as plain values.
        command: that makes the features again, for errors.

    Raises:
        FeaturesError: where they are not those of this source.
    """
    again = f"Make them again by: {command}"
    if name not in features.sources:
        raise FeaturesError(
            f"data.features: {folder} has no features of data.{name}; it has them of "
            f"{list(features.sources)}. {again}"
        )
    known = features.sources[name]
    if changed := differences(known.converter, converter):
        raise FeaturesError(
            f"data.features: {folder} holds data.{name} as another converter gave it:\n  "
            + "\n  ".join(changed)
            + f"\n{again}"
        )
    found = StoredSource(source, str(shards_of(folder, name)))
    try:
        if found.shards.dataset_id != known.dataset_id:
            raise ShardError("they are not those that were written")
    except ShardError as error:
        raise FeaturesError(
            f"data.features: the shards of data.{name} in {folder} were changed: {error}. {again}"
        ) from error
    own = shards_there(source)
    if own and own.dataset_id != known.origin:
        raise FeaturesError(
            f"data.{name}.shards are not those that {folder} was made from (data set "
            f"{own.dataset_id}, there {known.origin}). {again}"
        )
    if own and (shard := changed_shard(own, known.contents)):
        raise FeaturesError(
            f"data.{name}.shards: {shard} has changed since {folder} was made from it. {again}"
        )
    return found


def shards_there(source: Source) -> Shards | None:
    """A source's own shards; None where they are not there any more."""
    try:
        return Shards(source.patterns)
    except (ShardError, FileNotFoundError):
        return None


def contents_of(shards: Shards) -> list[list[Any]]:
    """When each shard was last changed, and a hash of all of it: ``dataset_id`` looks at a few
    places alone.
    """
    return [[os.stat(path).st_mtime_ns, file_hash(path)] for path in shards.paths]


def changed_shard(shards: Shards, contents: Sequence[Sequence[Any]]) -> str | None:
    """The first shard that is another one now. Read whole where its time of change is: a copy has
    the same content.
    """
    if len(contents) != len(shards.paths):
        return shards.paths[0]
    for path, (changed, digest) in zip(shards.paths, contents, strict=True):
        if os.stat(path).st_mtime_ns != changed and file_hash(path) != digest:
            return path
    return None


def file_hash(path: str | Path) -> str:
    """Of all of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def differences(there: Any, here: Any, key: str = "") -> list[str]:
    """``key: A there, B here`` for every value that differs."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        names = dict.fromkeys([*there, *here])
        pairs = ((there.get(n), here.get(n), f"{key}.{n}".lstrip(".")) for n in names)
        return [line for pair in pairs for line in differences(*pair)]
    return [] if there == here else [f"{key}: {there!r} there, {here!r} here"]
