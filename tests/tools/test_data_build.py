from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from PIL import Image
from transformers import AutoTokenizer

from mmfusion.cli import main
from mmfusion.data.converters.base import Converter
from mmfusion.data.converters.caption import Caption
from mmfusion.data.converters.conversation import Conversation
from mmfusion.data.shards import Shards
from mmfusion.data.source import Source
from mmfusion.processing.processor import Processor
from mmfusion.tools.data_build import build
from mmfusion.types import Media
from tests.data.tars import read_with_webdataset
from tests.models.tiny import TinyProcessor, save_tokenizer

MEDIA = ("a.jpg", "b.png", "sub/c.JPG", "d.wav", "e.mp4", "two.dots.png")


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder of small real media."""
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    image = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
    for name in MEDIA:
        if name.lower().endswith(("jpg", "png")):
            image.save(folder / name)
    soundfile.write(folder / "d.wav", np.sin(np.arange(1600) / 5), 16_000)
    with av.open(str(folder / "e.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 16
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return folder


def write_list(folder: Path, name: str, entries: list[Any]) -> str:
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    elif name.endswith(".json"):
        path.write_text(json.dumps(entries))
    else:
        text = io.StringIO()
        rows = csv.DictWriter(text, entries[0], delimiter="\t" if name.endswith("tsv") else ",")
        rows.writeheader()
        rows.writerows(entries)
        path.write_text(text.getvalue())
    return str(path)


def records(folder: Path) -> list[tuple[str, dict[str, bytes]]]:
    shards = Shards(str(folder))
    read = [(key, record) for record, _, key in map(shards.read, range(len(shards)))]
    assert read == [sample for path in shards.paths for sample in read_with_webdataset(Path(path))]
    return read


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv"])
def test_captioned_media_of_every_kind_of_list(media: Path, tmp_path: Path, kind: str) -> None:
    entries = [{"path": name, "caption": f'Größe, "{i}"\nline'} for i, name in enumerate(MEDIA)]
    listed = write_list(media, f"all.{kind}", entries)
    build(listed, str(tmp_path / "out"), decode=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["all-000000.tar", "all-000000.tar.idx"]
    assert records(tmp_path / "out") == [
        (
            f"{i:08d}",
            {
                name.rpartition(".")[2].lower(): (media / name).read_bytes(),
                "txt": f'Größe, "{i}"\nline'.encode(),
            },
        )
        for i, name in enumerate(MEDIA)
    ]


def turns(question: Any, name: str = "content") -> list[dict[str, Any]]:
    who, roles = ("from", ("human", "gpt")) if name == "value" else ("role", ("user", "assistant"))
    return [{who: roles[0], name: question}, {who: roles[1], name: "Größe"}]


def asked(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return turns([{"type": "text", "text": "look"}, *parts])


IMAGE, PNG = {"type": "image", "image": "a.jpg"}, {"type": "image", "image": "b.png"}
LAYOUTS = [
    ({"image": "sub/c.JPG", "conversations": turns("<image> w1", "value")}, ["sub/c.JPG"]),
    ({"image": ["a.jpg", "a.jpg"], "conversations": turns("<image><image>", "value")},
     ["a.jpg", "a.jpg"]),
    ({"images": ["a.jpg", "b.png"], "audio": "d.wav", "messages": turns("<audio><image><image>")},
     ["d.wav", "a.jpg", "b.png"]),
    ({"image": None, "conversations": turns("w1", "value")}, []),
    ({"messages": turns("w1")}, []),
    ({"messages": asked()}, []),
    ({"messages": asked(IMAGE)}, ["a.jpg"]),
    ({"messages": asked({"type": "image", "path": "b.png"})}, ["b.png"]),
    ({"messages": asked({"type": "image", "image": {"path": "two.dots.png"}})}, ["two.dots.png"]),
    ({"messages": asked({"type": "image_url", "image_url": {"url": "b.png", "detail": "low"}})},
     ["b.png"]),
    ({"messages": asked({"type": "image_url", "image_url": "sub/c.JPG"})}, ["sub/c.JPG"]),
    ({"messages": asked({"type": "input_image", "image_url": "a.jpg"})}, ["a.jpg"]),
    ({"messages": asked({"type": "input_audio", "input_audio": {"data": "d.wav"}})}, ["d.wav"]),
    ({"messages": asked({"type": "audio", "audio": "d.wav"})}, ["d.wav"]),
    ({"messages": asked({"type": "video", "video": "e.mp4", "start": 0, "end": 1})}, ["e.mp4"]),
    ({"messages": asked({"type": "video_url", "video_url": {"url": "e.mp4"}})}, ["e.mp4"]),
    ({"messages": asked(PNG, IMAGE, {"type": "audio", "path": "d.wav"}, PNG)},
     ["b.png", "a.jpg", "d.wav", "b.png"]),
    ({"image": "a.jpg", "messages": asked(IMAGE)}, ["a.jpg"]),
    ({"images": ["b.png", "a.jpg"], "messages": asked(IMAGE, {"type": "image"})},
     ["a.jpg", "b.png"]),
    ({"image": "a.jpg", "messages": asked({"type": "audio", "audio": "d.wav"}, {"type": "image"})},
     ["d.wav", "a.jpg"]),
    ({"conversations": turns([IMAGE], "value")}, ["a.jpg"]),
]  # fmt: skip


def read_back(folder: Path, converter: Converter, tmp_path: Path) -> list[list[str | bytes]]:
    """Media of each sample in reading order, read and planned as in training."""
    save_tokenizer(tmp_path / "tokenizer")
    modalities = ("image", "audio", "video")
    processor = Processor(
        AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
        {modality: TinyProcessor(modality) for modality in modalities},
        {modality: lambda features: features for modality in modalities},
    )
    source = Source(str(folder), converter)
    found = []
    for sample in map(source.__getitem__, range(len(source))):
        planned = processor.plan(sample)
        content = [part for message in sample.messages for part in message.content]
        media = [part for part in content if isinstance(part, Media)]
        assert [slots.modality for slots in planned.media] == [item.modality for item in media]
        assert planned.trained.any()
        found.append([item.data for item in media])
    return found


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_every_layout_of_a_conversation_is_read_back_with_its_media(
    media: Path, tmp_path: Path, kind: str
) -> None:
    entries = [entry for entry, _ in LAYOUTS]
    build(write_list(media, f"all.{kind}", entries), str(tmp_path / "out"), decode=True)
    read = read_back(tmp_path / "out", Conversation(), tmp_path)
    assert read == [[(media / name).read_bytes() for name in names] for _, names in LAYOUTS]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv"])
def test_captions_are_read_back_with_their_media(media: Path, tmp_path: Path, kind: str) -> None:
    entries = [{"path": name, "caption": f"w{i}", "by": "x"} for i, name in enumerate(MEDIA)]
    build(write_list(media, f"all.{kind}", entries), str(tmp_path / "out"))
    for text in ("txt", "json:caption"):
        read = read_back(tmp_path / "out", Caption(text), tmp_path)
        assert read == [[(media / name).read_bytes()] for name in MEDIA]


def test_conversations_are_kept_but_for_the_names_of_their_parts(
    media: Path, tmp_path: Path
) -> None:
    plain = {"id": "x", "image": "sub/c.JPG", "conversations": turns("<image>\nWhat?", "value")}
    url = {"type": "image_url", "image_url": {"url": "b.png", "detail": "low"}}
    named = {"id": "y", "audio": "d.wav", "messages": asked(url, {"type": "audio"}, IMAGE, url)}
    build(write_list(media, "l.json", [plain, named]), str(tmp_path / "out/train-%03d.tar"))
    (_, first), (_, second) = records(tmp_path / "out")
    content = {name: (media / name).read_bytes() for name in MEDIA}
    assert json.loads(first.pop("json")) == plain
    assert first == {"jpg": content["sub/c.JPG"]}
    url = {"type": "image_url", "image_url": {"url": "1.png", "detail": "low"}}
    image = {"type": "image", "image": "2.jpg"}
    stored = named | {"messages": asked(url, {"type": "audio"}, image, url)}
    assert json.loads(second.pop("json")) == stored
    assert second == {
        "0.wav": content["d.wav"], "1.png": content["b.png"], "2.jpg": content["a.jpg"],
    }  # fmt: skip


def test_further_fields_of_a_caption_are_kept(media: Path, tmp_path: Path) -> None:
    entry = {"image": "a.jpg", "text": "a", "licence": "CC0"}
    build(write_list(media, "l.jsonl", [entry]), str(tmp_path / "out"))
    ((_, record),) = records(tmp_path / "out")
    assert json.loads(record["json"]) == entry


def test_shards_roll_over_and_keys_are_numbers_of_entries(media: Path, tmp_path: Path) -> None:
    entries = [{"path": "a.jpg", "caption": str(i)} for i in range(7)]
    entries[3]["path"] = "missing.jpg"
    listed = write_list(media, "l.csv", entries)
    build(listed, str(tmp_path / "out"), shard_samples=4, max_bad=1)
    assert Shards(str(tmp_path / "out")).counts == [4, 2]
    assert [key for key, _ in records(tmp_path / "out")] == [f"{i:08d}" for i in (0, 1, 2, 4, 5, 6)]


def nested(depth: int) -> Any:
    return json.loads("[" * depth + "]" * depth)


GOOD = {"image": "a.jpg", "caption": "a"}
BAD_ENTRIES = [
    ({"image": "missing.jpg", "caption": "a"}, "missing.jpg does not exist"),
    ({"image": "sub", "caption": "a"}, "no extension of a media file"),
    ({"image": "empty.jpg", "caption": "a"}, "empty.jpg is empty"),
    ({"image": "notes.txt", "caption": "a"}, "'txt' is no extension of a media file"),
    ({"image": "../secret.jpg", "caption": "a"}, "lies outside of"),
    ({"image": "/etc/passwd.jpg", "caption": "a"}, "lies outside of"),
    ({"image": "link.jpg", "caption": "a"}, "lies outside of"),
    ({"image": "a\0.jpg", "caption": "a"}, "is no path of a file"),
    ({"image": "https://example.org/a.jpg", "caption": "a"}, "addresses are not fetched"),
    ({"image": "a.jpg", "caption": "  "}, "expected a caption, got '  '"),
    ({"image": "a.jpg", "caption": None}, "expected a caption, got None"),
    ({"image": "a.jpg", "caption": "\ud800"}, "cannot be written as UTF-8"),
    ({"image": "a.jpg"}, r"exactly one of the fields \('caption', 'text'\), got \['image'\]"),
    ({"image": "a.jpg", "audio": "d.wav", "text": "a"}, "exactly one of the fields"),
    ({"image": ["a.jpg"], "text": "a"}, "expected the path of one file"),
    ({"image": "a.jpg", "conversations": []}, "'conversations' must be a list of turns"),
    ({"image": 3, "conversations": [{}]}, "'image' must be a path"),
    ({"image": "a.jpg", "conversations": turns("w1", "value")}, "cannot be used: .* never shows"),
    ({"image": None, "conversations": turns("<image>", "value")}, "be used: .*asks for more"),
    ({"messages": turns("w1")[:1]}, "cannot be used: .*ending with the assistant"),
    ({"messages": asked({"type": "image", "image": "none.jpg"})}, "none.jpg does not exist"),
    ({"messages": asked({"type": "image", "image": ["a.jpg"]})}, "path of one file in 'image'"),
    ({"messages": asked({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}})},
     "embedded in the text; write it to a file"),
    ({"messages": asked({"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}})},
     "embedded in the text; write it to a file"),
    ({"messages": asked({"type": "input_audio", "input_audio": {"data": "a.xyz"}})},
     "'xyz' is no extension of a media file"),
    (["a.jpg", "a"], "expected an object with named fields, got list"),
    ({"messages": asked({"type": "audio", "audio": "d.wav", "start": 10**400})}, "expected sec"),
    ({"messages": [*turns("w1")[:1], {"role": "assistant", "content": " "}]}, "has no text"),
    ({"messages": turns("w1"), "more": nested(700)}, "cannot be written as JSON: .*recursion"),
    ({"image": nested(700), "caption": "a"}, "expected the path of one file"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "problem"), BAD_ENTRIES)
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_bad_entry_is_named_with_its_line(
    media: Path, tmp_path: Path, entry: Any, problem: str, kind: str
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.jpg")
    (media / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (media / "empty.jpg").touch()
    (media / "notes.txt").write_text("x")
    listed = write_list(media, f"l.{kind}", [GOOD, entry])
    place = r"l.jsonl:2: " if kind == "jsonl" else r"l.json\[1\]: "
    with pytest.raises(ValueError, match=rf"1 bad entries(.|\n)*{place}.*{problem}"):
        build(listed, str(tmp_path / "out"))
    assert not list(tmp_path.glob("out/*"))
    build(listed, str(tmp_path / "out"), max_bad=1)
    assert [key for key, _ in records(tmp_path / "out")] == ["00000000"]


def test_files_outside_are_taken_where_it_is_allowed(media: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    listed = write_list(media, "l.json", [{"image": "../other.png", "caption": "a"}])
    build(listed, str(tmp_path / "one"), allow_outside=True)
    listed = write_list(media, "l.json", [{"image": "other.png", "caption": "a"}])
    build(listed, str(tmp_path / "two"), media_root=str(tmp_path))
    assert records(tmp_path / "one") == records(tmp_path / "two")


@pytest.mark.parametrize("name", ["a.jpg", "d.wav", "e.mp4"])
def test_broken_media_are_found_by_decoding_and_leave_nothing(
    media: Path, tmp_path: Path, name: str
) -> None:
    (media / name).write_bytes((media / name).read_bytes()[:30])
    entries = [{"image": "b.png", "caption": "b"}, {"path": name, "caption": "a"}]
    listed = write_list(media, "l.jsonl", entries)
    with pytest.raises(ValueError, match=rf"l.jsonl:2: .*{name} cannot be decoded"):
        build(listed, str(tmp_path / "out"), decode=True, shard_samples=1)
    assert os.listdir(tmp_path / "out") == []
    build(listed, str(tmp_path / "out"), decode=True, max_bad=1)
    assert len(records(tmp_path / "out")) == 1
    build(listed, str(tmp_path / "out"), overwrite=True)
    assert len(records(tmp_path / "out")) == 2


def test_many_bad_entries_are_counted_and_the_first_listed(media: Path, tmp_path: Path) -> None:
    listed = write_list(media, "l.csv", [{"path": f"{i}.jpg", "caption": "a"} for i in range(50)])
    with pytest.raises(ValueError, match=r"50 bad entries(.|\n)*l.csv:21:(.|\n)*and 30 more") as e:
        build(listed, str(tmp_path / "out"), max_bad=49)
    assert "l.csv:22:" not in str(e.value)
    with pytest.raises(ValueError, match="none of its 50 entries makes a sample"):
        build(listed, str(tmp_path / "out"), max_bad=50)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("l.json", b'[{"image": "a.jpg",\n "caption" "a"}]', "not JSON: .*line 2"),
        ("l.json", b'{"image": "a.jpg"}', "expected a list of samples, got dict"),
        ("l.json", b"\xff\xff", "not JSON"),
        ("l.json", b"[]", "none of its 0 entries"),
        ("l.jsonl", b'{"image": "a.jpg", "caption": "a"}\n\n{"image": \n', "l.jsonl:3: not a line"),
        ("l.jsonl", b'{"image": "a.jpg", "caption": "\xff"}', "l.jsonl:1: not a line of JSON"),
        ("l.jsonl", b'{"image": "a.jpg", "caption": NaN}', "NaN is no JSON value"),
        ("l.jsonl", b'{"image": "a.jpg", "caption": "a", "n": 1e999}', "1: .*cannot be written"),
        ("l.csv", b"a.jpg,a cat\n", "first line must name the columns"),
        ("l.csv", b"", "first line must name the columns"),
        ("l.csv", b"path,caption,caption\n", "comes twice"),
        ("l.csv", b"path,caption\na.jpg,one,two\n", "l.csv:2: expected 2 values"),
        ("l.csv", b"path,caption\na.jpg\n", "l.csv:2: expected 2 values"),
        ("l.csv", b'path,caption\na.jpg,"open\n', "l.csv:2 cannot be read"),
        ("l.csv", b"path,caption\na.jpg,\xff\n", "l.csv:2 cannot be read"),
        ("l.parquet", b"", "expected a list that ends in .jsonl"),
    ],
)
def test_broken_lists_are_refused(
    media: Path, tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (media / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        build(str(media / name), str(tmp_path / "out"))
    assert not list(tmp_path.glob("out/*"))


def test_a_list_that_is_no_regular_file_is_refused(media: Path, tmp_path: Path) -> None:
    os.mkfifo(media / "l.jsonl")
    with pytest.raises(ValueError, match=r"l\.jsonl is no regular file"):
        build(str(media / "l.jsonl"), str(tmp_path / "out"))


def test_byte_order_marks_are_no_part_of_a_list(media: Path, tmp_path: Path) -> None:
    for name, text in (("l.csv", "path,caption\na.jpg,a\n"), ("l.jsonl", json.dumps(GOOD))):
        (media / name).write_text(text, encoding="utf-8-sig")
        build(str(media / name), str(tmp_path / name))
        assert len(records(tmp_path / name)) == 1


@pytest.mark.slow
def test_command_line_builds_shards(media: Path, tmp_path: Path) -> None:
    write_list(media, "l.jsonl", [GOOD, {"image": "missing.jpg", "caption": "a"}])
    run = [sys.executable, "-m", "mmfusion", "data", "build", str(media / "l.jsonl")]
    done = subprocess.run([*run, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "l.jsonl:2" in done.stderr
    assert "--max_bad is 0" in done.stderr
    more = [str(tmp_path / "out"), "--max_bad", "1", "--overwrite", "true"]
    done = subprocess.run([*run, *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 samples" in done.stdout
    assert "1 bad entries were left out" in done.stdout
    assert len(records(tmp_path / "out")) == 1


@pytest.mark.slow
def test_a_build_that_is_terminated_leaves_nothing(media: Path, tmp_path: Path) -> None:
    listed = write_list(media, "l.jsonl", [GOOD] * 20_000)
    out = tmp_path / "out"
    run = [sys.executable, "-m", "mmfusion", "data", "build", listed, str(out), "--decode", "true"]
    process = subprocess.Popen(run, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out.is_dir() and any(out.iterdir())):
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 143
    assert not any(out.iterdir())


@pytest.mark.parametrize(
    "option", ["--max_bad=-1", "--shard_samples=0", "--shard_bytes=0", "--max_bad=some"]
)
def test_a_number_that_cannot_be_meant_is_refused(option, media, tmp_path, capsys) -> None:
    listed = write_list(media, "l.jsonl", [GOOD])
    with pytest.raises(SystemExit):
        main(["data", "build", listed, str(tmp_path / "out"), option])
    assert option[2:].partition("=")[0] in capsys.readouterr().err
