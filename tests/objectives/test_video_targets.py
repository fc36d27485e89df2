"""Answers with clips: both losses and sampling through the whole model, beside answers in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfusion import tuning
from mmfusion.data.collate import collate
from mmfusion.inference import Chat
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.generators.base import PARTS, Sampling
from mmfusion.models.generators.text_to_video_sd import TextToVideoSD
from mmfusion.models.generators.wan import Wan
from mmfusion.models.llms.hf_causal_lm import HFCausalLM
from mmfusion.models.output_projectors.query_decoder import QueryDecoder
from mmfusion.objectives.condition_alignment import ConditionAlignment
from mmfusion.objectives.denoising import Denoising
from mmfusion.processing.videos import decode_video
from mmfusion.tuning import Full, NewTokens
from mmfusion.types import Batch, ConditioningSpec, Media, Message, Sample, SampleRef, Text
from tests.models.generators.families import clip
from tests.models.generators.tiny import save_text_to_video_sd, save_wan
from tests.models.tiny import save_llm

OBJECTIVES = [ConditionAlignment("video"), Denoising("video", drop_condition=0.1)]


def decoder(in_dim: int, spec: ConditioningSpec) -> QueryDecoder:
    return QueryDecoder(
        in_dim, spec, dim=16, encoder_layers=1, decoder_layers=1, heads=2, ffn_dim=24
    )


@pytest.fixture(params=["text-to-video-sd", "wan"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> AnyToAnyModel:
    save_llm(tmp_path / "llm")
    generator: Any = (
        Wan(save_wan(tmp_path / "wan"), height=16, width=32, num_frames=5, fps=4, tokens=7)
        if request.param == "wan"
        else TextToVideoSD(
            save_text_to_video_sd(tmp_path / "sd"), height=16, width=32, num_frames=2, fps=4
        )
    )
    torch.manual_seed(0)
    llm = HFCausalLM(str(tmp_path / "llm"))
    made = AnyToAnyModel(
        {}, {}, llm, {"video": 3}, {"video": decoder}, {"video": generator}, {"video": PARTS}
    )
    made.build()
    tuning.apply(made, {"output_projectors": Full(1e-3), "llm": NewTokens(1e-3)})
    return made.eval()


def batch_of(model: AnyToAnyModel, *captions: str | None) -> Batch:
    samples = []
    for index, caption in enumerate(captions):
        answer = replace(clip(index), caption=caption) if caption else Text("w3")
        turns = (Message("user", (Text("w1 w2"),)), Message("assistant", (answer,)))
        ref = SampleRef("s", 0, index, index)
        samples.append(model.processor().encode(Sample(turns), None, ref))
    return collate(samples, model.processor())


def test_steps_on_clips_lower_both_losses(model: AnyToAnyModel) -> None:
    batch = batch_of(model, "w1", None, "w2 w3")
    assert batch.targets["video"].tensors["pixels"].shape[2:] == (3, 16, 32)
    trained = [p for p in model.parameters() if p.requires_grad]
    for objective in OBJECTIVES:
        optimizer, losses = torch.optim.Adam(trained, 3e-3), []
        for _ in range(3):
            output = model(batch)
            loss = objective(model, output, batch)
            assert int(loss.count) == 2
            losses.append(loss.total)
            optimizer.zero_grad()
            (loss.total + output.idle).backward()
            optimizer.step()
        assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.generators.parameters())


def test_without_clips_the_graph_is_the_same_and_the_loss_zero(model: AnyToAnyModel) -> None:
    batch = batch_of(model, None, None)
    output = model(batch)
    losses = [objective(model, output, batch) for objective in OBJECTIVES]
    assert [float(loss.total.detach()) for loss in losses] == [0.0, 0.0]
    (sum(loss.total for loss in losses) + output.idle).backward()
    assert all(p.grad is not None for p in model.output_projectors.parameters())


def test_an_answer_is_a_clip(model: AnyToAnyModel) -> None:
    """Forced to begin with the first signal token, it is drawn from the answer's own states."""
    chat = Chat(model)
    first = chat.processor.signal_ids["video"][0]
    vocabulary = model.llm.logits(torch.zeros(1, model.llm.hidden_dim)).shape[-1]
    others = [i for i in range(vocabulary) if i != first]
    asked = [[Message("user", (Text(words),))] for words in ("w1 w2", "w3")]
    sampling = Sampling(steps=2, guidance_scale=3.0, seed=1)
    answers = chat.generate(asked, max_new_tokens=3, suppress_tokens=others, sampling=sampling)
    num_frames = 5 if isinstance(model.generator("video"), Wan) else 2
    for answer in answers:
        (made,) = answer.parts
        assert isinstance(made, Media)
        assert (made.modality, made.format) == ("video", "mp4")
        frames = decode_video(made.data, "mp4", num_frames=num_frames)
        assert frames.shape == (num_frames, 3, 16, 32)
    assert answers[0].media[0].data != answers[1].media[0].data
