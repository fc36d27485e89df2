from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmfusion.processing import images
from mmfusion.processing.audios import audio_seconds, decode_audio
from mmfusion.processing.base import MediaProcessor
from mmfusion.processing.images import decode_image, image_size, resize
from mmfusion.processing.processor import Processor
from mmfusion.types import DataError, Media, Message, Sample, Text
from tests.processing.conftest import CHATML


class Patches(MediaProcessor):
    """One feature for each full 16 x 16 patch of the picture."""

    modality = "image"

    def __init__(self, side: int = 16) -> None:
        self.side = side

    def num_features(self, media: Media) -> int:
        height, width = image_size(media.data)
        return (height // self.side) * (width // self.side)

    def __call__(self, media: Media, rng: Any = None) -> dict[str, torch.Tensor]:
        image = decode_image(media.data, media.format)
        if rng is not None and rng.random() < 0.5:
            image = image.flip(-1)
        count = (image.shape[-2] // self.side) * (image.shape[-1] // self.side)
        return {"pixels": resize(image, (8, 8)), "num_features": torch.tensor(count)}

    def idle(self) -> dict[str, torch.Tensor]:
        return {"pixels": torch.zeros(3, 8, 8), "num_features": torch.tensor(1)}


class Tenths(MediaProcessor):
    """One feature for each tenth of a second; a broken one decodes one more than it promised."""

    modality = "audio"

    def __init__(self, surplus: int = 0) -> None:
        self.surplus = surplus

    def num_features(self, media: Media) -> int:
        return int(audio_seconds(media.data) * 10)

    def __call__(self, media: Media, rng: Any = None) -> dict[str, torch.Tensor]:
        count = len(decode_audio(media.data, media.format, 1000)) // 100 + self.surplus
        return {"num_features": torch.tensor(count)}

    def idle(self) -> dict[str, torch.Tensor]:
        return {"num_features": torch.tensor(1)}


def same(features: int) -> int:
    return features


def halved(features: int) -> int:
    return features // 2


def picture(height: int = 32, width: int = 48) -> Media:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return Media("image", file.getvalue(), "png")


def sound(seconds: float = 0.5) -> Media:
    file = io.BytesIO()
    samples = np.sin(np.arange(round(seconds * 16000)) / 9)
    soundfile.write(file, samples, 16000, format="WAV")
    return Media("audio", file.getvalue(), "wav")


@pytest.fixture
def processor(trained_tokenizer: Any) -> Processor:
    tokenizer = copy.deepcopy(trained_tokenizer)
    tokenizer.chat_template = CHATML
    return Processor(
        tokenizer, {"image": Patches(), "audio": Tenths()}, {"image": halved, "audio": same}
    )


def chat(*content: str | Media, answer: str | Media = "Yes.") -> Sample:
    def parts(items: tuple[str | Media, ...]) -> tuple[Text | Media, ...]:
        return tuple(item if isinstance(item, Media) else Text(item) for item in items)

    return Sample((Message("user", parts(content)), Message("assistant", parts((answer,)))))


def reason(processor: Processor, sample: Sample) -> str:
    with pytest.raises(DataError) as error:
        processor.encode(sample)
    return error.value.reason


def test_media_take_their_slots_in_reading_order(processor: Processor) -> None:
    sample = chat("a", picture(32, 48), "b", sound(), picture(16, 64), "c")
    planned = processor.plan(sample)
    assert [(s.modality, s.num_features, s.num_tokens) for s in planned.media] == [
        ("image", 6, 3),
        ("audio", 5, 5),
        ("image", 4, 2),
    ]
    for slots in planned.media:
        ids = planned.input_ids[slots.start : slots.start + slots.num_tokens]
        assert set(ids.tolist()) == {processor.placeholder_ids[slots.modality]}
        assert not planned.trained[slots.start : slots.start + slots.num_tokens].any()
    placeholders = torch.isin(
        planned.input_ids, torch.tensor(list(processor.placeholder_ids.values()))
    )
    assert placeholders.sum() == 10
    text, _ = processor._renderer.chat(sample.messages)
    kept = planned.input_ids[~placeholders].tolist()
    assert kept == [i for i in text if i not in processor.placeholder_ids.values()]


def test_slots_change_no_other_token_or_mark(processor: Processor) -> None:
    with_media, without = processor.plan(chat("a", picture(), "b")), processor.plan(chat("ab"))
    tail = 4
    assert torch.equal(with_media.input_ids[-tail:], without.input_ids[-tail:])
    assert with_media.trained.sum() == without.trained.sum()


def test_plain_sample_trains_caption_end_and_eos(processor: Processor) -> None:
    sample = Sample(
        (
            Message("user", (picture(), Text("caption:"))),
            Message("assistant", (Text(" a bird\n"),)),
        ),
        format="plain",
        eos=True,
    )
    encoded = processor.encode(sample)
    planned = encoded.planned
    assert planned.input_ids[0] == processor.tokenizer.bos_token_id
    trained = processor.tokenizer.decode(planned.input_ids[planned.trained])
    assert "".join(trained.split()) == "abird</s>"
    assert not planned.trained[0]


def test_plan_decodes_nothing(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patches, "__call__", None)
    assert len(processor.plan(chat(picture(), "a"))) > 3


def test_encode_is_plan_then_finish(processor: Processor) -> None:
    sample = chat(picture(), "a", sound())
    planned = processor.plan(sample)
    first = processor.finish(sample, planned, np.random.default_rng(1))
    second = processor.encode(sample, np.random.default_rng(1))
    assert torch.equal(first.planned.input_ids, second.planned.input_ids)
    assert torch.equal(first.tensors[0]["pixels"], second.tensors[0]["pixels"])
    assert first.tensors[1]["num_features"] == 5


def test_unusable_samples_have_their_own_reasons(processor: Processor) -> None:
    question = Message("user", (picture(), Text("a")))
    assert reason(processor, Sample((question,))) == "nothing_trained"
    assert reason(processor, chat(picture(), answer=" \n")) == "empty_text"
    assert reason(processor, chat("a <image> b")) == "special_token_in_text"
    assert reason(processor, chat(picture(8, 8))) == "empty_image"
    assert reason(processor, chat(picture(16, 16))) == "empty_image"
    assert reason(processor, chat(Media("image", b"\xff\xd8 broken", "jpg"))) == "corrupt_image"
    assert reason(processor, Sample((), format="plain")) == "nothing_trained"


def test_decoded_count_must_be_the_planned_one(trained_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(trained_tokenizer)
    tokenizer.chat_template = CHATML
    processor = Processor(tokenizer, {"audio": Tenths(surplus=1)}, {"audio": same})
    assert reason(processor, chat(sound(), "a")) == "count_mismatch"


def test_media_without_an_encoder_stop_the_run(processor: Processor) -> None:
    with pytest.raises(ValueError, match="input_projectors") as error:
        processor.plan(chat(Media("video", b"", "mp4"), "a"))
    assert not isinstance(error.value, DataError)


def test_template_that_drops_messages_is_noticed(trained_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(trained_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] == 'assistant' or add_generation_prompt %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    processor = Processor(tokenizer, {"image": Patches()}, {"image": same})
    with pytest.raises(ValueError, match="template"):
        processor.plan(chat(picture(), "a"))


def test_modalities_need_both_parts(trained_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="both"):
        Processor(trained_tokenizer, {"image": Patches()}, {})


def test_owners_tokenizer_stays_as_it_is(trained_tokenizer: Any) -> None:
    before = len(trained_tokenizer)
    processor = Processor(trained_tokenizer, {"image": Patches()}, {"image": same})
    assert len(trained_tokenizer) == before
    assert len(processor.tokenizer) == before + 3
    assert "<image>" not in trained_tokenizer.get_vocab()


def test_adding_a_modality_keeps_the_ids_of_the_others(trained_tokenizer: Any) -> None:
    one = Processor(trained_tokenizer, {"audio": Tenths()}, {"audio": same})
    both = Processor(
        trained_tokenizer, {"image": Patches(), "audio": Tenths()}, {"image": same, "audio": same}
    )
    assert one.placeholder_ids["audio"] == both.placeholder_ids["audio"]


def test_prompt_ends_with_the_generation_prompt(processor: Processor) -> None:
    encoded = processor.prompt([Message("user", (picture(), Text("a")))])
    assert not encoded.planned.trained.any()
    assert encoded.planned.media[0].num_tokens == 3
    whole = processor.plan(chat(picture(), "a")).input_ids
    assert torch.equal(whole[: len(encoded.planned)], encoded.planned.input_ids)


def test_fingerprint_follows_what_changes_ids_or_slots(trained_tokenizer: Any) -> None:
    def fingerprint(template: str = CHATML, side: int = 16, count: Any = same) -> str:
        tokenizer = copy.deepcopy(trained_tokenizer)
        tokenizer.chat_template = template
        return Processor(tokenizer, {"image": Patches(side)}, {"image": count}).fingerprint()

    assert fingerprint() == fingerprint()
    others = {fingerprint(CHATML + " "), fingerprint(side=8), fingerprint(count=halved)}
    assert len(others | {fingerprint()}) == 4


def test_fingerprint_names_a_fallback_decoder(
    trained_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = Processor(trained_tokenizer, {"image": Patches(16)}, {"image": same})
    before = processor.fingerprint()
    monkeypatch.setattr(images, "simplejpeg", None)
    assert processor.fingerprint() != before


def _plan_in_child(data: bytes, sample: Sample, queue: Any) -> None:
    processor = pickle.loads(data)  # noqa: S301
    queue.put((processor.fingerprint(), processor.plan(sample).input_ids.tolist()))


def test_processor_pickles(processor: Processor) -> None:
    sample = chat(picture(), "a")
    again = pickle.loads(pickle.dumps(processor))  # noqa: S301
    assert again.fingerprint() == processor.fingerprint()
    assert torch.equal(again.plan(sample).input_ids, processor.plan(sample).input_ids)


@pytest.mark.slow
def test_processor_works_in_a_spawned_process(processor: Processor) -> None:
    context = multiprocessing.get_context("spawn")
    sample, queue = chat(picture(), "a"), context.Queue()
    data = pickle.dumps(processor)
    child = context.Process(target=_plan_in_child, args=(data, sample, queue))
    child.start()
    fingerprint, ids = queue.get(timeout=120)
    child.join()
    assert fingerprint == processor.fingerprint()
    assert ids == processor.plan(sample).input_ids.tolist()
