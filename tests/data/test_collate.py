"""Collating: one row or padded rows, media in reading order, idle media, checked counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmfusion.data.collate import collate
from mmfusion.types import (
    IGNORE_INDEX,
    EncodedSample,
    Media,
    Message,
    Sample,
    SampleRef,
    Text,
)
from tests.data.synthetic import make_processor


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def encode(processor, index: int, images: list[bytes], words: str) -> EncodedSample:
    media = tuple(Media("image", image, "bar") for image in images)
    messages = ((Message("user", media),) if media else ()) + (
        Message("assistant", (Text(words),)),
    )
    sample = Sample(messages, "plain", shard="shard.tar", key=f"{index}")
    return processor.encode(sample, ref=SampleRef("s", 0, index))


@pytest.fixture(scope="module")
def samples(processor) -> list[EncodedSample]:
    return [
        encode(processor, 0, [b"\x01\x02\x03", b"\x07"], "w1 w2"),
        encode(processor, 1, [], "w3 w4 w5 w6 w7 w8 w9"),
        encode(processor, 2, [b"\x05\x05\x05\x05\x05"], "w1"),
    ]


def test_a_row_holds_the_samples_end_to_end(processor, samples):
    batch = collate(samples, processor)
    lengths = [len(sample.planned) for sample in samples]
    assert batch.input_ids.shape == (1, sum(lengths))
    assert batch.cu_seqlens.tolist() == [0, lengths[0], sum(lengths[:2]), sum(lengths)]
    assert batch.cu_seqlens.dtype == torch.int32
    for s, sample in enumerate(samples):
        span = slice(batch.cu_seqlens[s], batch.cu_seqlens[s + 1])
        assert torch.equal(batch.input_ids[0, span], sample.planned.input_ids)
        assert batch.position_ids[0, span].tolist() == list(range(lengths[s]))
        assert (batch.segment_ids[0, span] == s).all()
        trained = sample.planned.trained
        assert torch.equal(batch.labels[0, span] != IGNORE_INDEX, trained)
    assert batch.step_counts["tokens"] == sum(
        int(sample.planned.trained.sum()) for sample in samples
    )


def test_media_keep_reading_order_and_their_slots(processor, samples):
    batch = collate(samples, processor)
    image = batch.media["image"]
    assert image.num_features.tolist() == [3, 1, 5]
    assert image.num_tokens.tolist() == [2, 1, 3]
    assert image.tensors["rows"][:, 0].tolist() == [1, 7, 5]
    placeholder = processor.placeholder_ids["image"]
    assert (batch.input_ids.flatten() == placeholder).nonzero().flatten().equal(image.slots)
    assert not image.idle


def test_padded_rows_hold_the_same_samples(processor, samples):
    packed, padded = collate(samples, processor), collate(samples, processor, pad_rows=True)
    assert padded.input_ids.shape == (3, max(len(sample.planned) for sample in samples))
    assert padded.cu_seqlens is None
    for s in range(3):
        here, there = padded.segment_ids == s, packed.segment_ids == s
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(getattr(padded, name)[here], getattr(packed, name)[there])
    assert (padded.labels[padded.segment_ids == -1] == IGNORE_INDEX).all()
    flat = padded.input_ids.flatten()
    assert (flat[padded.media["image"].slots] == processor.placeholder_ids["image"]).all()
    assert padded.step_counts == packed.step_counts


def test_the_first_token_of_a_sample_is_never_a_label(processor, samples):
    planned = samples[1].planned
    all_trained = replace(planned, trained=torch.ones_like(planned.trained))
    batch = collate([replace(samples[1], planned=all_trained)] * 2, processor)
    assert (batch.labels[0, batch.cu_seqlens[:-1].long()] == IGNORE_INDEX).all()
    assert batch.step_counts["tokens"] == 2 * (len(planned) - 1)


@pytest.mark.parametrize("pad_rows", [False, True])
def test_no_samples_give_one_unlabelled_token_and_idle_media(processor, pad_rows):
    batch = collate([], processor, pad_rows)
    assert batch.input_ids.shape == (1, 1)
    assert batch.labels.tolist() == [[IGNORE_INDEX]]
    assert batch.segment_ids.tolist() == [[-1]]
    assert batch.samples == []
    assert batch.step_counts["tokens"] == 0
    image = batch.media["image"]
    assert image.idle
    assert image.tensors["rows"].shape == (1, 8)
    assert (image.num_tokens.tolist(), len(image.slots)) == ([0], 0)


def test_absent_modality_is_idle_beside_real_text(processor, samples):
    assert collate(samples[1:2], processor).media["image"].idle


def test_a_plan_with_a_stray_placeholder_is_refused(processor, samples):
    planned = samples[1].planned
    ids = planned.input_ids.clone()
    ids[2] = processor.placeholder_ids["image"]
    stray = replace(samples[1], planned=replace(planned, input_ids=ids))
    with pytest.raises(ValueError, match=r"1 image placeholder tokens.*s:shard.tar:1.*expected 0"):
        collate([stray], processor)


def test_a_batch_moves_with_its_provenance(processor, samples):
    batch = collate(samples, processor)
    moved = batch.to("meta")
    assert moved.media["image"].tensors["rows"].device.type == "meta"
    assert moved.samples == batch.samples
