"""The benchmark's figures of a tiny generator and a judge that sees how bright pictures are."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmfusion.metrics.judges.classifier import ClassifierJudge
from mmfusion.models.generators.base import PARTS, Sampling
from mmfusion.models.generators.stable_diffusion import StableDiffusion
from mmfusion.types import Media
from tests.benchmarks.generators import figures
from tests.models.generators.families import picture
from tests.models.generators.tiny import save_stable_diffusion


class Light(ClassifierJudge):
    """Says whether the upper left pixel is bright; captions do as well."""

    def __init__(self) -> None:
        super().__init__(["light"])

    def labels(self, wanted: Media) -> dict[str, str] | None:
        return {"light": wanted.caption or ""}

    def classify(self, media: Sequence[Media]) -> list[Mapping[str, str]]:
        pixels = [Image.open(io.BytesIO(one.data)).convert("L").getpixel((0, 0)) for one in media]
        return [{"light": "bright" if int(str(x)) > 127 else "dark"} for x in pixels]


@pytest.mark.slow
def test_shares_and_losses_are_those_of_the_media(tmp_path: Path) -> None:
    generator = StableDiffusion(save_stable_diffusion(tmp_path / "sd"))
    generator.build(PARTS)
    generator.requires_grad_(False).eval()
    judge: Any = Light()
    media = [replace(picture(i), caption="?") for i in range(4)]
    seen = [str(said["light"]) for said in judge.classify(media)]
    media = [replace(one, caption=light) for one, light in zip(media, seen, strict=True)]
    found = figures(generator, judge, media, Sampling(2, 3.0, 0))
    assert found["right, true"] == 1.0
    assert 0 <= found["right, made"] <= 1
    assert found["seconds for one"] > 0
    losses = [value for name, value in found.items() if name.startswith("loss")]
    assert len(losses) == 3
    assert all(0.1 < loss < 10 for loss in losses)
    wrong = [replace(one, caption="neither") for one in media]
    assert figures(generator, judge, wrong, Sampling(2, 3.0, 0))["right, true"] == pytest.approx(0)
