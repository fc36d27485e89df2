"""Media in answers: signal tokens with any tokenizer and template, targets, captions."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmfusion.data.collate import collate
from mmfusion.processing.processor import Processor
from mmfusion.processing.special_tokens import signal_tokens
from mmfusion.types import DataError, Media, Message, Sample, SampleRef, Text
from tests.processing.conftest import CHATML, GENERATION, LLAMA2
from tests.processing.test_processor import Patches, Tenths, halved, picture, sound

COUNTS = {"image": 4, "audio": 2}


def made(tokenizer: Any, template: str = CHATML, **options: Any) -> Processor:
    """It reads pictures, and makes pictures and sounds."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    for modality, count in COUNTS.items():
        tokenizer.add_tokens(signal_tokens(modality, count), special_tokens=True)
    targets = {"image": Patches(), "audio": Tenths()}
    return Processor(
        tokenizer, {"image": Patches()}, {"image": halved}, None, targets, COUNTS, **options
    )


def captioned(media: Media, caption: str | None = "a cat") -> Media:
    return replace(media, caption=caption)


def talk(*answer: Text | Media, ask: tuple[Text | Media, ...] = (Text("draw a cat"),)) -> Sample:
    return Sample((Message("user", ask), Message("assistant", answer)))


@pytest.mark.parametrize("template", [CHATML, LLAMA2, GENERATION])
def test_signal_tokens_stand_for_media_of_answers_and_are_trained(
    trained_tokenizer: Any, template: str
) -> None:
    """With no tokenizer does anything come between them (NExT-GPT counts on one filler each)."""
    processor = made(trained_tokenizer, template)
    answer = (Text("Here: "), captioned(picture()), Text(" and "), captioned(sound()))
    sample = talk(*answer, ask=(picture(), Text("draw it again")))
    planned = processor.plan(sample)
    ids = planned.input_ids.tolist()
    assert [slots.modality for slots in planned.media] == ["image"]
    assert [slots.modality for slots in planned.targets] == ["image", "audio"]
    for slots in planned.targets:
        place = slice(slots.start, slots.start + COUNTS[slots.modality])
        assert ids[place] == processor.signal_ids[slots.modality]
        assert planned.trained[place].all()
    signals = {index for found in processor.signal_ids.values() for index in found}
    assert sum(index in signals for index in ids) == 6


def test_targets_are_decoded_and_keep_their_captions(trained_tokenizer: Any) -> None:
    processor = made(trained_tokenizer)
    encoded = processor.encode(talk(captioned(picture(), "a cat"), captioned(sound(), None)))
    assert encoded.captions == ("a cat", "")
    assert encoded.targets[0]["pixels"].shape == (3, 8, 8)
    assert encoded.targets[1]["num_features"] == 5
    assert encoded.tensors == ()


def test_a_prompt_keeps_earlier_answers_and_has_no_targets(trained_tokenizer: Any) -> None:
    processor = made(trained_tokenizer, captioned=["image"])
    turns = (*talk(captioned(picture(), None)).messages, Message("user", (Text("and a dog"),)))
    encoded = processor.prompt(turns)
    assert encoded.planned.targets == ()
    assert processor.signal_ids["image"][0] in encoded.planned.input_ids.tolist()


def test_answers_that_cannot_be_made_are_refused(trained_tokenizer: Any) -> None:
    processor = made(trained_tokenizer, captioned=["image"])
    video = Media("video", b"", "mp4", caption="a")
    with pytest.raises(ValueError, match=r"answers hold \['video'\], but the model has generators"):
        processor.plan(talk(video))
    for caption in (None, " "):
        with pytest.raises(DataError, match="has no caption") as error:
            processor.plan(talk(captioned(picture(), caption)))
        assert error.value.reason == "no_caption"
    assert processor.plan(talk(captioned(sound(), None)))  # nothing compares it
    with pytest.raises(DataError) as error:
        processor.encode(talk(Media("image", b"\xff\xd8 broken", "jpg", caption="a")))
    assert error.value.reason == "corrupt_image"
    with pytest.raises(DataError) as error:
        processor.plan(talk(Text("forged <image_0>")))
    assert error.value.reason == "special_token_in_text"


def test_a_template_that_splits_signal_tokens_is_refused(trained_tokenizer: Any) -> None:
    spaced = GENERATION.replace(
        "m['content']", "m['content'] | replace('<image_1>', ' x <image_1>')"
    )
    with pytest.raises(ValueError, match="signal tokens of image do not follow one another"):
        made(trained_tokenizer, spaced).plan(talk(captioned(picture())))


def test_what_changes_targets_changes_the_fingerprint(trained_tokenizer: Any) -> None:
    one, two = made(trained_tokenizer), made(trained_tokenizer)
    assert one.fingerprint() == two.fingerprint()
    two.targets["image"].side = 8
    assert one.fingerprint() != two.fingerprint()


def test_a_batch_holds_the_targets_of_its_samples(trained_tokenizer: Any) -> None:
    processor = made(trained_tokenizer)
    samples = [
        talk(captioned(picture(), "a")),
        talk(Text("no")),
        talk(captioned(picture(), "b"), captioned(picture(), "c")),
    ]
    refs = [SampleRef("s", 0, index, index) for index in range(3)]
    encoded = [processor.encode(s, None, ref) for s, ref in zip(samples, refs, strict=True)]
    batch = collate(encoded, processor)
    image, audio = batch.targets["image"], batch.targets["audio"]
    assert batch.step_counts["image"] == 3
    assert batch.step_counts["audio"] == 0
    assert image.captions == ["a", "b", "c"]
    assert image.segments.tolist() == [0, 2, 2]
    assert batch.input_ids.flatten()[image.slots].tolist() == [processor.signal_ids["image"]] * 3
    assert image.tensors["pixels"].shape == (3, 3, 8, 8)
    assert audio.idle
    assert not image.idle
    again = collate(encoded[2:], processor).targets["image"]
    assert again.keys.tolist() == image.keys.tolist()[1:]
    assert len(set(image.keys.tolist())) == 3
    later = replace(encoded[0], ref=SampleRef("s", 1, 0, 0))
    assert collate([later], processor).targets["image"].keys[0] != image.keys[0]
    assert (image.keys >= 0).all()
    assert torch.equal(collate([], processor).targets["image"].segments, torch.zeros(1).long())
