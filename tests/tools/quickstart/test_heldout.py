import io

import numpy as np
import pytest
import soundfile

from mmfusion.data.converters.caption import Caption
from mmfusion.data.converters.conversation import Conversation
from mmfusion.data.source import Source
from mmfusion.tools.quickstart import datasets
from mmfusion.tools.quickstart.build import write_set
from mmfusion.tools.quickstart.heldout import (
    HeldOut,
    alone,
    blank,
    read_held_out,
    strangers,
    text_of,
    with_media,
)
from mmfusion.tools.quickstart.sources import read_committed
from mmfusion.types import Media, Message, Sample, Text


def item(key: str, concept: str, source: str = "s") -> HeldOut:
    sample = Sample(
        (
            Message("user", (Media("image", key.encode(), "jpg"), Text("What?"))),
            Message("assistant", (Text(f" {concept}.\n"),)),
        ),
        key=key,
    )
    return HeldOut(sample, {"concept": concept, "source": source})


ITEMS = [item(f"{s}{n}", f"concept {n % 7}", s) for s in "ab" for n in range(14)]


def test_strangers_are_of_the_same_source_and_of_other_concepts():
    for index, found in enumerate(strangers(ITEMS, 6)):
        concepts = [ITEMS[other].concept for other in found]
        assert len(set(concepts)) == len(found) == 6
        assert ITEMS[index].concept not in concepts
        assert {ITEMS[other].about["source"] for other in found} == {ITEMS[index].about["source"]}


def test_strangers_are_the_same_every_time_and_differ_between_samples():
    assert strangers(ITEMS, 3) == strangers(ITEMS, 3)
    assert len({tuple(found) for found in strangers(ITEMS, 3)}) > 5


def test_a_source_of_one_concept_has_no_strangers():
    assert strangers([item("a", "x"), item("b", "x"), item("c", "y", "t")], 2) == [[], [], []]


def test_media_are_replaced_in_reading_order():
    text = Text("and")
    a, b, c, d = (Media("image", name, "png") for name in (b"a", b"b", b"c", b"d"))
    sample = Sample(
        (Message("user", (a, text)), Message("assistant", (text,)), Message("user", (b,)))
    )
    changed = with_media(sample, [c, d])
    assert changed.messages[0].content == (c, text)
    assert changed.messages[2].content == (d,)
    assert sample.media == [a, b]


def test_another_draw_of_strangers_is_another_choice_and_the_same_every_time():
    first, second = (strangers(ITEMS, 3, draw) for draw in (0, 1))
    assert first != second
    assert second == strangers(ITEMS, 3, 1)


@pytest.fixture(scope="module")
def pictures(assets):
    return read_committed(assets)


def test_blank_sound_is_as_long_and_can_be_decoded(pictures):
    data = pictures[0].speech["en"].read_bytes()
    quiet = blank(Media("audio", data, "ogg"))
    samples, rate = soundfile.read(io.BytesIO(quiet.data))
    original, its_rate = soundfile.read(io.BytesIO(data))
    assert len(samples) / rate == pytest.approx(len(original) / its_rate, abs=0.03)
    assert 0 < np.abs(samples).max() < 1e-3


def test_blank_pictures_and_clips_are_white():
    from mmfusion.processing.images import decode_image

    white = blank(Media("image", b"", "png"))
    assert decode_image(white.data, white.format).min() == 255
    assert blank(Media("video", b"", "mp4")).modality == "video"


def test_held_out_samples_come_with_their_records(pictures, tmp_path):
    write_set(tmp_path / "pictures", datasets.pictures(pictures))
    source = Source(str(tmp_path / "pictures" / "train-*.tar"), Caption())
    items = read_held_out(source)
    assert len(items) == len(source)
    assert [i.sample.key for i in read_held_out(source, 5)] == [i.sample.key for i in items[:5]]
    assert {i.about["concept"] for i in items} <= {picture.concept for picture in pictures}


def test_every_question_is_asked_alone_with_its_picture(assets):
    (entry, *_) = datasets.shapes(assets / "shapes", "val", 1, 3)
    held_out = HeldOut(Conversation()(entry.record, "s", entry.key), {"concept": "c"})
    asked = list(alone([held_out]))
    assert len(asked) == 3
    whole = held_out.sample.messages
    for n, (_, sample, truth) in enumerate(asked):
        (question,) = sample.messages
        assert question.content[0] == held_out.sample.media[0]
        assert question.content[1] == Text("\n" + text_of(whole[2 * n]))
        assert truth == text_of(whole[2 * n + 1])
    assert asked[0][1].messages[0] == whole[0]
