"""Judges against slow references; a tiny random CLIP saved to disk."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from mmfusion.metrics.judges.classifier import ClassifierJudge
from mmfusion.metrics.judges.clip_score import CLIPScore
from mmfusion.metrics.judges.frechet import FrechetDistance
from mmfusion.types import DataError, Media, MediaTensors
from tests.models.tiny import TinyEncoder, TinyProcessor, clip_config, save_clip

LETTERS = "abcdefghij"
LONG = " ".join(LETTERS * 3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Whole: both towers, the vision tower's settings, a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{x}</w>" for x in LETTERS)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12).save_pretrained(folder)
    text = {"vocab_size": 22, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 12, "bos_token_id": 0,
            "eos_token_id": 1}  # fmt: skip
    torch.manual_seed(2)
    config = CLIPConfig(text_config=text, vision_config=clip_config().to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


def picture(seed: int, caption: str | None = None) -> Media:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return Media("image", file.getvalue(), "png", caption=caption)


MADE = [picture(i) for i in range(4)]
WANTED = [picture(10, "a b"), picture(11, LONG), picture(12, None), picture(13, "e")]


def cosine(judge: CLIPScore, media: Media, caption: str) -> float:
    model = judge.made.model.model
    letters = [12 + LETTERS.index(letter) for letter in caption.split()][:10]
    with torch.no_grad():
        a = model.get_image_features(judge.pictures(media)["pixels"][None]).pooler_output[0]
        b = model.get_text_features(torch.tensor([[0, *letters, 1]])).pooler_output[0]
    return float(100 * torch.dot(a, b) / a.norm() / b.norm())


def test_clip_score_is_the_mean_cosine_over_the_captions(clip: str) -> None:
    judge = CLIPScore(clip)
    assert not list(judge.parameters())
    judge.build()
    assert judge.compute() == {}
    judge.update([MADE[2]], [WANTED[2]])  # without a caption there is nothing to compare with
    assert judge.compute() == {}
    for i in range(3):
        judge.update(MADE[i : i + 2], WANTED[i : i + 2])
    pairs = [0, 1, 1, 3]
    found = judge.compute()
    captions = [str(WANTED[i].caption) for i in pairs]
    for name, media in (("clip_score", MADE), ("clip_score_truth", WANTED)):
        expected = np.mean(
            [cosine(judge, media[i], c) for i, c in zip(pairs, captions, strict=True)]
        )
        assert found[name] == pytest.approx(max(expected, 0), abs=1e-3)
    judge.reset()
    assert judge.compute() == {}


@pytest.mark.slow
def test_a_clip_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    folder = save_clip(tmp_path)  # the vision tower alone
    judge = CLIPScore(folder)
    with pytest.raises(ValueError):
        judge.build()
    with pytest.raises(FileNotFoundError, match="no folder"):
        CLIPScore(f"{folder}/absent")


def vectors(seed: int, count: int) -> list[Media]:
    draw = np.random.default_rng(seed)
    return [Media("image", draw.bytes(int(draw.integers(1, 5))), "bin") for _ in range(count)]


def test_frechet_distance_equals_the_formula_over_the_encoders_features() -> None:
    judge = FrechetDistance(TinyEncoder())
    judge.build()
    made, wanted = vectors(0, 30), vectors(1, 30)
    assert judge.compute() == {}
    for start in range(0, 30, 7):
        judge.update(made[start : start + 7], wanted[start : start + 7])
    moments = []
    for media in (made, wanted):
        rows = []
        for item in media:
            x = judge.encoder.media_processor()(item)["x"][None, : len(item.data)]
            rows.append(judge.encoder({"x": x})[0].mean(0).detach().double().numpy())
        moments.append((np.mean(rows, 0), np.cov(rows, rowvar=False)))
    (m1, c1), (m2, c2) = moments
    values, axes = np.linalg.eigh(c1)
    root = axes * np.sqrt(values.clip(0)) @ axes.T  # of the first covariance
    crossed = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root).clip(0)).sum()
    expected = np.square(m1 - m2).sum() + np.trace(c1 + c2) - 2 * crossed
    assert judge.compute()["frechet"] == pytest.approx(expected, rel=1e-2, abs=1e-2)
    judge.reset()
    judge.update(made, made)
    assert judge.compute()["frechet"] == pytest.approx(0, abs=1e-3)


class Words(ClassifierJudge):
    """Sees the words in the file."""

    def __init__(self) -> None:
        super().__init__(["color", "shape"])

    def labels(self, wanted: Media) -> Mapping[str, str] | None:
        words = (wanted.caption or "").split()
        return dict(zip(self.aspects, words, strict=True)) if words else None

    def classify(self, media: Sequence[Media]) -> Sequence[Mapping[str, str]]:
        return [dict(zip(self.aspects, m.data.decode().split(), strict=True)) for m in media]


def shown(words: str, caption: str | None = None) -> Media:
    return Media("image", words.encode(), "bin", caption=caption)


def test_a_classifier_says_which_media_show_what_was_wanted() -> None:
    judge = Words()
    assert judge.compute() == {}
    wanted = [shown("blue star", "blue ring"), shown("red ring", "red ring"), shown("a b")]
    judge.update([shown("blue ring"), shown("red star"), shown("c d")], wanted)
    judge.update([shown("gray disc")], [shown("teal disc", "teal disc")])
    assert judge.compute() == pytest.approx({
        "right/color": 2 / 3, "right/shape": 2 / 3, "right/all": 1 / 3,
        "right_truth/color": 1.0, "right_truth/shape": 2 / 3, "right_truth/all": 2 / 3,
    })  # fmt: skip
    judge.reset()
    judge.update([shown("c d")], [shown("a b")])
    assert judge.compute() == {}


def test_what_cannot_be_decoded_is_not_right_and_ends_nothing() -> None:
    """A sound that was made may be silent."""

    class Careful(Words):
        def classify(self, media: Sequence[Media]) -> Sequence[Mapping[str, str]]:
            if any(not item.data for item in media):
                raise DataError("silent_audio", "all samples are zero")
            return super().classify(media)

    judge, wanted = Careful(), [shown("red ring", "red ring")] * 3
    judge.update([shown("red ring"), shown(""), shown("red star")], wanted)
    assert judge.compute() == pytest.approx({
        "right/color": 2 / 3, "right/shape": 1 / 3, "right/all": 1 / 3,
        "right_truth/color": 1.0, "right_truth/shape": 1.0, "right_truth/all": 1.0,
    })  # fmt: skip


def test_frechet_distance_leaves_out_and_counts_what_cannot_be_decoded() -> None:
    class Careful(TinyProcessor):
        def __call__(self, media: Media, rng: Any = None) -> MediaTensors:
            if not media.data:
                raise DataError("silent_audio", "all samples are zero")
            return super().__call__(media, rng)

    class CarefulEncoder(TinyEncoder):
        def media_processor(self) -> TinyProcessor:
            return Careful(self.modality)

    made, wanted = vectors(0, 8), vectors(1, 8)
    whole, judge = FrechetDistance(CarefulEncoder()), FrechetDistance(CarefulEncoder())
    whole.build()
    judge.build()
    whole.update(made, wanted)
    judge.update([*made[:3], shown(""), *made[3:]], [*wanted[:3], wanted[0], *wanted[3:]])
    judge.update([shown("")], [wanted[0]])
    assert judge.compute() == pytest.approx({**whole.compute(), "left_out": 2}, rel=1e-6)


def test_aspects_are_named() -> None:
    class Bare(Words):
        def __init__(self) -> None:
            ClassifierJudge.__init__(self, ["all"])

    with pytest.raises(ValueError, match=r"aspects is \['all'\]; expected one or more"):
        Bare()
