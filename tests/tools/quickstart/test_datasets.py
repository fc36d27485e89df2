"""The builders on the committed set: what the quickstart falls back to without Debian's stamps."""

import io
import json
from collections import defaultdict

import av
import numpy as np
import pytest
from PIL import Image

from mmfusion.data.converters.caption import Caption
from mmfusion.data.converters.conversation import Conversation
from mmfusion.data.source import Source
from mmfusion.tools.quickstart import datasets, talks
from mmfusion.tools.quickstart.build import HeldOut, write_set
from mmfusion.tools.quickstart.concepts import split_of
from mmfusion.tools.quickstart.pictures import MOTIONS, encode_mp4, flatten, motion_frames
from mmfusion.tools.quickstart.sources import (
    MAX_WORDS,
    read_committed,
    read_drawings,
    read_pictures,
    read_stamps,
)


@pytest.fixture(scope="module")
def pictures(assets):
    return read_committed(assets)


def about(entry):
    return json.loads(entry.record["json"])


def test_committed_set_is_small_and_whole(assets, pictures):
    assert sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) < 400_000
    assert len(pictures) == len({picture.concept for picture in pictures}) > 60
    assert all(min(picture.load().size) > 16 for picture in pictures)


def test_same_picture_gives_the_same_entry(pictures):
    first, again = (list(datasets.pictures(pictures[:3])) for _ in range(2))
    assert first == again


def test_every_concept_is_on_one_side_in_all_sets(assets, pictures):
    entries = [
        *datasets.pictures(pictures),
        *datasets.speech(pictures),
        *datasets.motions(pictures[:12], {"train": 1, "val": 2}),
        *talks.talks(pictures[:12]),
    ]
    sides = defaultdict(set)
    for entry in entries:
        sides[about(entry)["concept"]].add(entry.split)
    assert all(len(found) == 1 for found in sides.values())
    assert {"train", "val"} == set.union(*sides.values())
    assert list(HeldOut().check(entries)) == entries


def test_concept_on_both_sides_is_refused(pictures):
    entry = next(datasets.pictures(pictures))
    other = datasets.Entry({"train": "val", "val": "train"}[entry.split], "again", entry.record)
    with pytest.raises(AssertionError, match="again: concept"):
        list(HeldOut().check([entry, other]))


def test_speech_keeps_the_recording_and_names_its_language(pictures):
    spoken = [picture for picture in pictures if picture.speech]
    entries = list(datasets.speech(spoken))
    assert len(entries) == len(spoken) == 36
    assert entries[0].record["ogg"] == spoken[0].speech["en"].read_bytes()
    assert about(entries[0])["source"] == "speech-en"
    assert entries[0].record["txt"].decode() == spoken[0].caption


def test_held_out_pictures_get_their_own_number_of_motions(pictures):
    entries = list(datasets.motions(pictures[:10], {"train": 1, "val": 3}))
    count = {"train": 1, "val": 3}
    assert len(entries) == sum(count[split_of(picture.concept)] for picture in pictures[:10])
    for entry in entries:
        assert MOTIONS[about(entry)["motion"]] in entry.record["txt"].decode()


def test_new_motions_of_a_picture_are_held_out_and_all_others_trained(pictures):
    entries = list(datasets.new_motions(pictures[:5], 2, ()))
    for picture in pictures[:5]:
        own = [entry for entry in entries if picture.name in entry.key]
        sides = {
            split: {about(e)["motion"] for e in own if e.split == split}
            for split in ("train", "val")
        }
        assert (len(sides["train"]), len(sides["val"])) == (len(MOTIONS) - 2, 2)
        assert sides["train"] | sides["val"] == set(MOTIONS)
    held_out = {frozenset(about(e)["motion"] for e in entries[i : i + 2]) for i in range(0, 40, 8)}
    assert len(held_out) > 1  # not the same of every picture
    new = {e.record["txt"].decode() for e in entries if e.split == "val"}
    others = list(datasets.new_motions(pictures[:5], 2, new))
    assert not new & {e.record["txt"].decode() for e in others if e.split == "val"}


def center(frame):
    dark = np.argwhere(np.asarray(frame.convert("L")) < 250)
    return dark.mean(0)[::-1], len(dark)


@pytest.mark.parametrize("motion", sorted(MOTIONS))
def test_a_clip_moves_as_its_caption_says(motion):
    picture = Image.new("RGBA", (30, 50), "black")
    frames = motion_frames(picture, motion, 6, 64)
    with av.open(io.BytesIO(encode_mp4(frames, 4))) as container:
        decoded = [frame.to_image() for frame in container.decode(video=0)]
    assert len(decoded) == 6
    (first, small), (last, large) = center(decoded[0]), center(decoded[-1])
    dx, dy = last - first
    moves = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}.get(motion, (0, 0))
    assert (round(dx / 32), round(dy / 32)) == moves
    grown = {"grow": 1, "shrink": -1}.get(motion, 0)
    assert (large > 2 * small) - (small > 2 * large) == grown
    turned = np.abs(np.asarray(decoded[2], int) - np.asarray(decoded[0], int)).mean() > 2
    assert turned == (motion != "still")


def test_unknown_motion_is_refused():
    with pytest.raises(ValueError, match="'jump'"):
        motion_frames(Image.new("RGBA", (4, 4), "black"), "jump", 2, 16)


def test_transparent_border_is_cut_and_the_ground_is_white():
    picture = Image.new("RGBA", (100, 100))
    picture.paste((255, 0, 0, 255), (40, 45, 60, 55))
    flat = np.asarray(flatten(picture, 40))
    assert flat.shape == (40, 40, 3)
    assert (flat[20, [1, 20, 38]] == [255, 0, 0]).all()
    assert (flat[[2, 37], 20] == 255).all()


def test_questions_of_a_picture_are_dealt_to_conversations_once(assets):
    entries = list(datasets.shapes(assets / "shapes", "train", pictures=4, turns=3))
    asked = defaultdict(list)
    for entry in entries:
        messages = about(entry)["messages"]
        assert len(messages) <= 6
        assert messages[0]["content"].startswith("<image>\n")
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            asked[entry.key.split("-")[1]].append(
                (question["content"].removeprefix("<image>\n"), answer["content"])
            )
    expected = defaultdict(list)
    for question, answer, number in json.loads((assets / "shapes/questions.json").read_text()):
        if number < 4:
            expected[f"{number:04d}"].append((question, answer))
    assert {k: sorted(v) for k, v in asked.items()} == {k: sorted(v) for k, v in expected.items()}


def test_shapes_are_named_by_what_their_questions_tell(tmp_path):
    asked = [
        ["what is the blue shape?", "rectangle", 0],
        ["is there a red shape?", "no", 0],
        ["what color is the circle?", "teal", 1],
        ["what shape is present?", "circle", 4],
        ["what shape is in the image?", "triangle", 2],
        ["what color is the shape?", "blue", 3],
    ]
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"picture %d" % number)
    entries = list(datasets.named_shapes(tmp_path, "train", pictures=4))
    assert [entry.record["txt"] for entry in entries] == [b"A blue rectangle.", b"A teal circle."]
    assert [entry.record["png"] for entry in entries] == [b"picture 0", b"picture 1"]
    first, *_ = datasets.named_talks(tmp_path, "train", pictures=4)
    messages = json.loads(first.record["json"])["messages"]
    assert [m["content"] for m in messages][1:] == ["A blue rectangle."]
    assert messages[0]["content"].startswith("<image>")


def test_every_entry_is_a_sample_for_its_converter(assets, pictures, tmp_path):
    caption, conversation = Caption(), Conversation()
    for entry in [
        *datasets.pictures(pictures[:2]),
        *datasets.motions(pictures[:2], {"train": 1, "val": 1}),
    ]:
        sample = caption(entry.record, "s", entry.key)
        assert sample.messages[-1].content[0].text == entry.record["txt"].decode() + "\n"
    kinds = set()
    for entry in [*talks.talks(pictures[:2]), *datasets.shapes(assets / "shapes", "train", 1, 3)]:
        kinds |= {media.modality for media in conversation(entry.record, "s", entry.key).media}
    assert kinds == {"image", "audio", "video"}


def test_written_set_reads_back_and_is_counted(pictures, tmp_path):
    entries = list(datasets.pictures(pictures))
    counts = write_set(tmp_path / "pictures", entries)
    for split in ("train", "val"):
        side = {entry.key: entry for entry in entries if entry.split == split}
        source = Source(str(tmp_path / "pictures" / f"{split}-*.tar"), Caption())
        records = [source.shards.read(i) for i in range(len(source))]
        assert {key: record for record, _, key in records} == {k: e.record for k, e in side.items()}
        assert counts[split]["samples"] == len(side)
        assert counts[split]["by_source"] == {"clipart": len(side)}


def stamp(folder, name, lines, **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    for file, content in files.items():
        (folder / f"{name}{file.replace('__', '.')}").write_bytes(content)


def test_stamps_are_read_with_translations_and_speech(tmp_path):
    png = io.BytesIO()
    Image.new("RGBA", (9, 9), "red").save(png, "PNG")
    picture = {"__png": png.getvalue()}
    lines = ["A red fox.", "fr.utf8=Un renard roux.", "pt_BR.utf8=Uma raposa.", "de.utf8="]
    stamp(tmp_path / "animals", "fox.1", lines, **picture, _desc_fr__ogg=b"f", _desc__ogg=b"e")
    stamp(tmp_path / "symbols/alphabets/english", "a", ["The letter A."], **picture)
    stamp(tmp_path / "town", "svg_only", ["A house."])
    stamp(tmp_path / "town", "long", ["word " * (MAX_WORDS + 1)], **picture)
    stamp(tmp_path / "town", "empty", [""], **picture)
    (fox,) = read_stamps(tmp_path)
    assert (fox.name, fox.caption, fox.kind) == ("animals-fox-1", "A red fox.", "an animal")
    assert fox.translations == {"fr": "Un renard roux.", "pt_BR": "Uma raposa."}
    assert {code: path.read_bytes() for code, path in fox.speech.items()} == {
        "fr": b"f",
        "en": b"e",
    }
    turns = json.loads(talks.about_picture(fox).record["json"])["messages"]
    assert turns[1]["content"] == "A red fox."
    assert turns[3]["content"] == "It is an animal."
    assert turns[-1]["content"] in ("Un renard roux.", "Uma raposa.")


def test_drawings_are_named_by_their_files(tmp_path, assets):
    (tmp_path / "food").mkdir()
    (tmp_path / "food" / "ice_cream.jpg").write_bytes(
        (assets / "pictures" / "bear.jpg").read_bytes()
    )
    (drawing,) = read_drawings(tmp_path)
    assert (drawing.caption, drawing.concept, drawing.source) == (
        "Ice cream.",
        "ice cream",
        "drawings",
    )


def test_without_stamps_the_committed_set_is_read(assets):
    assert {picture.source for picture in read_pictures({}, assets)} == {"clipart"}


def test_without_any_pictures_the_error_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip install -e"):
        read_pictures({}, tmp_path)


def test_drawings_are_pieces_with_the_whole_shape(tmp_path):
    (tmp_path / "images").mkdir()
    picture = np.full((64, 64, 3), 230, np.uint8)
    picture[40:50, 3:20] = (0, 0, 255)
    Image.fromarray(picture).save(tmp_path / "images" / "0.png")
    wide = np.full((64, 64, 3), 230, np.uint8)
    wide[10:20, 5:60] = (255, 0, 0)
    Image.fromarray(wide).save(tmp_path / "images" / "1.png")
    questions = [
        ["what color is the rectangle?", "blue", 0],
        ["what color is the rectangle?", "red", 1],
        ["what shape is in the image?", "rectangle", 0],
        ["what shape is in the image?", "rectangle", 1],
    ]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    found = list(datasets.drawings(tmp_path, "train", 2, 3))
    assert len(found) == len({entry.key for entry in found}) == 3, "the wide one does not fit"
    for entry in found:
        piece = np.asarray(Image.open(io.BytesIO(entry.record["png"])))
        assert piece.shape == (32, 32, 3)
        assert (piece[..., 0] < 100).sum() == 10 * 17
        assert entry.record["txt"].decode() == "A blue rectangle."
