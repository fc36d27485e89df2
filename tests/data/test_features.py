"""A set of stored features: its manifest, its sources, and which sets are refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mmfusion.data.features import (
    MANIFEST,
    Features,
    FeaturesError,
    StoredPart,
    StoredSet,
    StoredSource,
    changed_shard,
    contents_of,
    differences,
    numbered,
    stored_source,
    with_stored,
)
from mmfusion.data.shards import Shards
from mmfusion.data.source import Source
from mmfusion.data.writer import ShardWriter
from mmfusion.processing.stored import item_file
from mmfusion.types import DataError, Media, Message, Sample, Text
from tests.training.tiny import TinyConverter, write_shards

CONVERTER = {"class_path": "tests.training.tiny.TinyConverter"}
COMMAND = "mmfusion data encode recipe.yaml --out f --overwrite"


def test_the_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    identity = {"class": "a.B", "arguments": {"size": 0.1}, "weights": {"m": "12"}}
    part = StoredPart(identity, {"features": ("F32", (None, 8))})
    given = Features(
        {"encoders.image": part}, {"sources.a": StoredSet("1", [[1, "h"]], CONVERTER, "2")}
    )
    given.write(tmp_path)
    found = Features.read(tmp_path, COMMAND)
    assert found == given
    assert found.parts["encoders.image"].fingerprint == part.fingerprint
    other = replace(part, identity={**identity, "class": "a.C"})
    assert other.fingerprint != part.fingerprint


def with_specs(specs: str) -> str:
    """A manifest of one part."""
    part = f'{{"identity": {{}}, "specs": {specs}}}'
    return f'{{"version": 2, "parts": {{"encoders.image": {part}}}, "sources": {{}}}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no features.json: features were not made there, or not all"),
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[]", "damaged or of another version"),
        ('{"version": 3, "parts": {}, "sources": {}}', "version 3, expected 2"),
        ('{"version": 2, "parts": {"a": 3}, "sources": {}}', "damaged"),
        ('{"version": 2, "parts": {}, "sources": {"a": {"b": 1}}}', "damaged"),
        (with_specs('{"features": ["F32", [null, -8]]}'), "tensors of F32, .None, -8."),
        (with_specs('{"features": ["F32", "88"]}'), "tensors of F32, 88"),
        (with_specs('{"features": ["F32", [true]]}'), "tensors of F32"),
        (with_specs('{"features": ["I64", [null, 8]]}'), "tensors of I64"),
        (with_specs('{"features": [["F32"], [8]]}'), "damaged"),
        (with_specs('{"features": ["F32"]}'), "damaged"),
    ],
)
def test_a_manifest_that_is_none_is_refused_with_the_command(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(FeaturesError, match=message) as error:
        Features.read(tmp_path, COMMAND)
    assert COMMAND in str(error.value)


def test_differences_name_each_value() -> None:
    there = {"class": "a.B", "arguments": {"grid": 2, "path": [1]}, "weights": {"m": "1"}}
    here = {"class": "a.B", "arguments": {"grid": 3, "path": [1]}, "weights": {"n": "1"}}
    assert differences(there, here) == [
        "arguments.grid: 2 there, 3 here",
        "weights.m: '1' there, None here",
        "weights.n: None there, '1' here",
    ]
    assert differences(there, json.loads(json.dumps(there))) == []


def test_items_are_numbered_in_reading_order_inputs_and_targets_apart() -> None:
    same = Media("image", b"a", "png")
    turns = (
        Message("user", (same, Text("x"), Media("audio", b"b", "wav"))),
        Message("assistant", (Text("y"), same)),
        Message("user", (same,)),
        Message("assistant", (Media("video", b"c", "mp4"), same)),
    )
    sample = Sample(turns)
    names = [name.removesuffix(".safetensors") for name, _ in numbered(sample)]
    assert names == ["media.0", "media.1", "target.0", "media.2", "target.1", "target.2"]
    files = {f"{name}.safetensors": name.encode() for name in names if name != "media.1"}
    found = with_stored(sample, files)
    assert [item.stored for item in found.media] == [b"media.0", b"", b"media.2"]
    assert [item.stored for item in found.targets] == [b"target.0", b"target.1", b"target.2"]
    assert with_stored(found, {}) == with_stored(sample, {})


@pytest.fixture
def made(tmp_path: Path) -> tuple[Source, Features, Path]:
    """A source and its features, all files empty."""
    source = Source(write_shards(tmp_path, "train", 6), TinyConverter())
    folder = tmp_path / "f"
    with ShardWriter(str(folder / "sources" / "a" / "000000-%d.tar")) as writer:
        for index in range(6):
            record, _, key = source.shards.read(index)
            files = {"media.0.safetensors": item_file({}, {})} if "image" in record else {}
            writer.write(key, record | files)
    contents = contents_of(source.shards)
    known = StoredSet(source.shards.dataset_id, contents, CONVERTER, Shards(str(folder)).dataset_id)
    return source, Features({}, {"sources.a": known}), folder


def test_a_stored_source_gives_the_same_samples(made: tuple[Source, Features, Path]) -> None:
    source, features, folder = made
    found = stored_source(features, folder, "sources.a", source, CONVERTER, COMMAND)
    assert (len(found), found.weight) == (len(source), source.weight)
    for index in range(6):
        live, stored = source[index], found[index]
        assert (stored.key, stored.format) == (live.key, live.format)
        assert stored.shard.startswith(str(folder))
        assert [m.data for m in stored.media] == [m.data for m in live.media]
        assert all(item.stored for item in stored.media)
        assert all(item.stored is None for item in live.media)


def test_features_of_captions_that_have_changed_are_refused(tmp_path: Path) -> None:
    """In the middle, where ``dataset_id`` does not look; a copy of the same is taken."""

    def write(caption: str) -> Source:
        with ShardWriter(str(tmp_path / "s-%d.tar"), overwrite=True) as writer:
            for number in range(200):
                text = caption if number in (60, 61) else "w1 w2"
                writer.write(f"{number:03d}", {"txt": text.encode()})
        return Source(str(tmp_path / "s-*.tar"), TinyConverter())

    source = write("w1 w2")
    known = StoredSet(source.shards.dataset_id, contents_of(source.shards), CONVERTER)
    os.utime(source.shards.paths[0], ns=(1, 1))
    assert changed_shard(source.shards, known.contents) is None
    other = write("w3 w4")
    assert other.shards.dataset_id == known.origin
    assert changed_shard(other.shards, known.contents) == str(tmp_path / "s-0.tar")


def test_a_member_that_features_took_the_place_of_is_empty(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "x-%d.tar")) as writer:
        file = item_file({}, {"instead_of": "image"})
        writer.write("a", {"txt": b"w1", "media.0.safetensors": file})
        writer.write("b", {"txt": b"w1", "media.0.safetensors": b"torn"})
    source = StoredSource(Source("nowhere", TinyConverter()), str(tmp_path))
    (item,) = source[0].media
    assert (item.data, item.stored) == (b"", file)
    with pytest.raises(DataError) as error:
        _ = source[1]
    assert error.value.reason == "corrupt_features"


def test_features_of_other_samples_are_refused_by_name(
    made: tuple[Source, Features, Path], tmp_path: Path
) -> None:
    source, features, folder = made

    def refused(message: str, name: str = "sources.a", **changes: object) -> None:
        given = {"source": source, "converter": CONVERTER} | changes
        with pytest.raises(FeaturesError, match=message) as error:
            stored_source(features, folder, name, command=COMMAND, **given)
        assert COMMAND in str(error.value)

    refused("no features of data.sources.b; it has them of .'sources.a'.", "sources.b")
    refused("another converter gave it:\n  class_path: ", converter={"class_path": "a.B"})
    other = Source(write_shards(tmp_path, "other", 6, seed=1), TinyConverter())
    refused("data.sources.a.shards are not those that .* was made from", source=other)
    (gone := Path(source.shards.paths[0])).unlink()
    stored_source(features, folder, "sources.a", source, CONVERTER, COMMAND)
    assert not gone.exists()  # the originals are not needed any more
    with ShardWriter(str(folder / "sources" / "a" / "000001-%d.tar")) as writer:
        writer.write("more", {"txt": b"w1"})
    refused("the shards of data.sources.a in .* were changed: they are not those")
    for path in (folder / "sources" / "a").glob("*.tar"):
        path.unlink()
    refused("were changed: .* holds no .tar file")
