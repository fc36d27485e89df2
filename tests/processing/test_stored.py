"""Files of stored tensors: what is read back, and what strangers may put into them."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest
import torch

from mmfusion.processing.stored import (
    FEATURES,
    StoredProcessor,
    item_file,
    read_header,
    read_item,
)
from mmfusion.types import DataError, Media
from tests.models.tiny import TinyProcessor

SPECS = {FEATURES: ("BF16", (None, 8))}


def features(count: int, **about: str) -> bytes:
    tensor = torch.arange(count * 8).view(count, 8).bfloat16()
    return item_file({FEATURES: tensor}, {"num_features": str(count), **about})


def media(stored: bytes | None, data: bytes = b"") -> Media:
    return Media("image", data, "bin", stored=stored)


@pytest.fixture
def processor() -> StoredProcessor:
    return StoredProcessor(TinyProcessor("image"), SPECS, "id")


def test_an_item_is_planned_by_its_header_and_read_bit_for_bit(processor: StoredProcessor) -> None:
    item = media(features(3))
    assert processor.num_features(item) == 3
    found = processor(item)
    assert found[FEATURES].equal(torch.arange(24).view(3, 8).bfloat16())
    assert found["num_features"] == 3


def test_a_medium_from_elsewhere_is_planned_by_its_own_header(processor: StoredProcessor) -> None:
    assert processor.num_features(media(None, b"ab")) == 2


def test_items_of_different_lengths_are_padded_with_zeros(processor: StoredProcessor) -> None:
    batch = processor.collate([processor(media(features(n))) for n in (1, 3)])
    assert batch[FEATURES].shape == (2, 3, 8)
    assert batch[FEATURES][0, 1:].abs().sum() == 0
    assert batch["num_features"].tolist() == [1, 3]
    idle = processor.collate([processor.idle()])
    assert idle[FEATURES].shape == (1, 1, 8)
    assert idle[FEATURES].dtype == torch.bfloat16


def test_what_is_not_stored_is_decoded_beside_it() -> None:
    specs = {"text.tokens": ("F32", (2, 4))}
    processor = StoredProcessor(TinyProcessor("image"), specs, "id", decodes=True)
    file = item_file({"text.tokens": torch.ones(2, 4), "latents.mean": torch.ones(3)}, {})
    item = processor(media(file, b"ab"))
    assert set(item) == {"x", "text.tokens"}  # what no part here reads is passed over
    batch = processor.collate([item, processor.idle()])
    assert (batch["x"].shape, batch["text.tokens"].shape) == ((2, 4, 6), (2, 2, 4))


def header(content: object, length: int | None = None) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


SPEC = {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 32]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "missing_features"),
        (b"abc", "corrupt_features"),
        (features(3)[:40], "corrupt_features"),
        (header({"a": SPEC}, 1 << 40), "corrupt_features"),
        (header([1]), "corrupt_features"),
        (header({"features": {"dtype": "F32"}}), "corrupt_features"),
        (header({"features": {"dtype": "F32", "shape": 3}}), "corrupt_features"),
        (header({"features": {"dtype": "F32", "shape": [float("inf")]}}), "corrupt_features"),
        (header({"__metadata__": [3]}), "corrupt_features"),
        (b"\xff" * 8 + bytes(1 << 17), "corrupt_features"),
    ],
)
def test_a_file_that_is_none_is_a_data_error(data: bytes, reason: str) -> None:
    with pytest.raises(DataError) as error:
        read_header(data)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (features(3)[:-1], "corrupt_features"),
        (features(3) + b"more", "corrupt_features"),
        (item_file({FEATURES: torch.ones(3, 8)}, {}), "bad_features"),
        (item_file({FEATURES: torch.ones(3, 7).bfloat16()}, {}), "bad_features"),
        (item_file({FEATURES: torch.ones(8).bfloat16()}, {}), "bad_features"),
        (item_file({"other": torch.ones(3, 8).bfloat16()}, {}), "bad_features"),
        (item_file({FEATURES: torch.full((1, 8), torch.nan).bfloat16()}, {}), "bad_features"),
        (item_file({}, {"error": "corrupt_image", "message": "torn"}), "corrupt_image"),
        (item_file({}, {"error": "Reason of\nmany lines"}), "corrupt_features"),
    ],
)
def test_other_tensors_than_the_set_holds_are_data_errors(data: bytes, reason: str) -> None:
    with pytest.raises(DataError) as error:
        read_item(data, SPECS)
    assert error.value.reason == reason


@pytest.mark.parametrize("count", ["-1", "1e9", "9" * 7, ""])
def test_a_forged_number_of_features_is_refused(processor: StoredProcessor, count: str) -> None:
    with pytest.raises(DataError, match="num_features"):
        processor.num_features(media(item_file({}, {"num_features": count})))
    with pytest.raises(DataError, match="num_features is 'None'"):
        processor.num_features(media(item_file({}, {"instead_of": "jpg"})))


def test_an_error_of_the_item_comes_where_it_would_have_come(processor: StoredProcessor) -> None:
    about = {"error": "corrupt_image", "message": "torn\x1b[31m"}
    at_plan = media(item_file({}, about))
    with pytest.raises(DataError, match="torn") as error:
        processor.num_features(at_plan)
    assert str(error.value).isprintable()
    at_decoding = media(item_file({}, {"num_features": "4", **about}))
    assert processor.num_features(at_decoding) == 4
    with pytest.raises(DataError, match="torn"):
        processor(at_decoding)


@pytest.mark.slow
def test_the_same_item_is_the_same_bytes_in_another_process():
    line = (
        "import hashlib, torch; from mmfusion.processing.stored import item_file; "
        "about = {'num_features': '3', 'error': 'x', 'message': 'y', 'z': '1'}; "
        "made = item_file({'b': torch.ones(3), 'a': torch.zeros(2)}, about); "
        "print(hashlib.sha256(made).hexdigest())"
    )
    found = {
        subprocess.run([sys.executable, "-c", line], capture_output=True, text=True).stdout
        for _ in range(3)
    }
    assert len(found) == 1
    assert len(found.pop().strip()) == 64
