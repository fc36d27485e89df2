from __future__ import annotations

import logging
from typing import Any

import pytest

from mmfusion.processing.limits import Limits
from mmfusion.processing.processor import Processor
from mmfusion.processing.stored import StoredProcessor, item_file
from mmfusion.types import DataError, Media, Message, Sample, Text
from tests.models.tiny import TinyProcessor
from tests.processing.conftest import CHATML
from tests.processing.test_processor import same

TALK = (Message("user", (Text("a bird"),)), Message("assistant", (Text("Yes."),)))


def processor(tokenizer: Any, limits: Limits | None = None) -> Processor:
    tokenizer.chat_template = CHATML
    media = {"image": TinyProcessor("image")}
    return Processor(tokenizer, media, {"image": same}, limits)


@pytest.fixture
def length(trained_tokenizer: Any) -> int:
    return len(processor(trained_tokenizer).plan(Sample(TALK)))


def test_a_sample_longer_than_learned_positions_is_left_out(
    trained_tokenizer: Any, length: int
) -> None:
    assert len(processor(trained_tokenizer, Limits(length, hard=True)).plan(Sample(TALK))) == length
    short = processor(trained_tokenizer, Limits(length - 1, hard=True))
    with pytest.raises(DataError, match=rf"has {length} tokens, the LLM takes at most") as error:
        short.plan(Sample(TALK))
    assert error.value.reason == "too_long"


def test_a_conversation_longer_than_learned_positions_says_what_to_do(
    trained_tokenizer: Any,
) -> None:
    count = len(processor(trained_tokenizer).prompt(TALK[:1]).planned)
    assert processor(trained_tokenizer, Limits(count, hard=True)).prompt(TALK[:1])
    with pytest.raises(ValueError, match=rf"has {count} tokens, .* at most {count - 1}; .*/reset"):
        processor(trained_tokenizer, Limits(count - 1, hard=True)).prompt(TALK[:1])


def test_beyond_rotary_positions_there_is_one_warning(
    trained_tokenizer: Any, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    reaching = processor(trained_tokenizer, Limits(length - 1))
    with caplog.at_level(logging.WARNING):
        assert [len(reaching.plan(Sample(TALK))) for _ in range(3)] == [length] * 3
    assert [record.getMessage() for record in caplog.records] == [
        f"the sample has {length} tokens, but the LLM was made for {length - 1} "
        "(max_position_embeddings): beyond them it may get worse. This is said once."
    ]


@pytest.mark.parametrize("hard", [True, False])
def test_a_promised_item_beyond_all_positions_is_not_planned(
    trained_tokenizer: Any, hard: bool
) -> None:
    stored = item_file({}, {"num_features": "999999"})
    assert len(stored) < 100
    limited = processor(trained_tokenizer, Limits(64, hard=hard))
    limited.media["image"] = StoredProcessor(limited.media["image"], {}, "")
    asked = Message("user", (Media("image", b"", "bin", stored=stored),))
    plans = (lambda: limited.plan(Sample((asked, TALK[1]))), lambda: limited.prompt([asked]))
    for plan in plans:
        with pytest.raises(DataError, match="one image needs 999999 tokens") as error:
            plan()
        assert error.value.reason == "too_long"


def test_tokens_without_an_embedding_are_refused_by_name(trained_tokenizer: Any) -> None:
    end = trained_tokenizer.convert_tokens_to_ids("<|im_end|>")
    partial = processor(trained_tokenizer, Limits(rows=end, without_row=frozenset({end})))
    with pytest.raises(ValueError, match=rf"'<\|im_end\|>': {end}.* has {end} rows") as error:
        partial.plan(Sample(TALK))
    assert not isinstance(error.value, DataError)  # no fault of the sample: the run stops
    with pytest.raises(ValueError, match="no embedding"):
        partial.prompt(TALK[:1])


def test_placeholders_need_no_row(trained_tokenizer: Any) -> None:
    trained_tokenizer = type(trained_tokenizer)(tokenizer_object=trained_tokenizer._tokenizer)
    trained_tokenizer.add_tokens(["<image>"], special_tokens=True)
    image = trained_tokenizer.convert_tokens_to_ids("<image>")

    limited = processor(trained_tokenizer, Limits(rows=image, without_row=frozenset({image})))
    asked = Message("user", (Media("image", b"\1\2", "bin"), Text("a bird")))
    assert (limited.plan(Sample((asked, TALK[1]))).input_ids == image).sum() == 2


@pytest.mark.parametrize(
    ("limits", "room"),
    [(Limits(9, hard=True), 3), (Limits(9), None), (Limits(None, hard=True), None)],
)
def test_learned_positions_leave_room_for_one_token_more(limits: Limits, room: int | None) -> None:
    """The last token that is generated is never read."""
    assert limits.room(7) == room
