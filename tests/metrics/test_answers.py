"""A sample as a question: what is asked, what is right in words, what is right in media."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from mmfusion.data.collate import collate
from mmfusion.metrics.answers import as_question
from mmfusion.processing.processor import Processor
from mmfusion.training.rebuild import from_recipe
from mmfusion.types import EncodedSample, Media, Message, Sample, SampleRef, Text
from tests.training.pictures import prepare, recipe


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    home = prepare(tmp_path_factory.mktemp("answers"))
    return from_recipe(str(recipe(home)))[0].model.processor()


def picture() -> Media:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "png")
    return Media("image", file.getvalue(), "png", caption="w1")


def encoded(processor: Processor, *turns: Message) -> EncodedSample:
    return processor.encode(Sample(turns), ref=SampleRef("s", 0, 0))


def test_media_of_the_last_answer_are_wanted_and_can_be_asked_for(processor: Processor) -> None:
    asked = Message("user", (Text("w31 w1"),))
    answered = Message("assistant", (Text("w7"), picture()))
    both = Message("assistant", (picture(), picture()))
    sample = encoded(processor, asked, answered, asked, both)
    question = as_question(sample, processor.tokenizer)
    assert question.wanted == ("image", "image")
    assert question.truth == ""
    first = encoded(processor, asked, answered)
    assert as_question(first, processor.tokenizer).truth == "w7"
    batch = collate([question.prompt], processor)
    assert batch.targets["image"].idle
    signals = torch.tensor(processor.signal_ids["image"])
    assert torch.isin(question.prompt.planned.input_ids, signals).sum() == 3  # of the first answer


def test_an_answer_of_words_wants_no_media(processor: Processor) -> None:
    turns = [
        Message("user", (Text("w31 w1"),)),
        Message("assistant", (picture(),)),
        Message("user", (Text("w2"),)),
        Message("assistant", (Text("w3 w4"),)),
    ]
    question = as_question(encoded(processor, *turns), processor.tokenizer)
    assert (question.wanted, question.truth) == ((), "w3 w4")
