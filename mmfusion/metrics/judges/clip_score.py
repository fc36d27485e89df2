"""CLIPScore (arXiv:2104.08718) by torchmetrics: does the picture show what the caption says?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.multimodal.clip_score import CLIPScore as Score

from mmfusion.metrics.judges.base import Judge
from mmfusion.models.encoders.hf_vision import HFVision
from mmfusion.models.loading import reading, refuse_missing
from mmfusion.types import Media


class CLIPScore(Judge):
    """``clip_score``: 100 times the cosine of picture and caption, and ``clip_score_truth``, that
    of the true pictures: what can be reached on these captions.

    Args:
        path: hub id or folder of a CLIP model (``openai/clip-vit-base-patch16``), in safetensors.
        revision: commit, tag or branch of a hub id.
    """

    modality = "image"

    def __init__(self, path: str, revision: str | None = None) -> None:
        super().__init__()
        self._vision = HFVision(path, revision=revision)
        self.path, self.revision = self._vision.path, revision
        self.made: Any = None
        self.truth: Any = None
        self.count = SumMetric()

    def build(self) -> None:
        if self.made is not None:
            return
        from transformers import AutoTokenizer, CLIPModel

        with reading(self.path):
            model, info = CLIPModel.from_pretrained(
                self.path,
                revision=self.revision,
                use_safetensors=True,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                self.path, revision=self.revision, trust_remote_code=False
            )
        refuse_missing(info, self.path, "CLIPModel")
        parts = _Features(model), _Inputs(tokenizer, model.config.text_config)
        self.made, self.truth = Score(lambda: parts), Score(lambda: parts)
        self.pictures = self._vision.media_processor()
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, made: Sequence[Media], wanted: Sequence[Media]) -> None:
        chosen = [i for i, media in enumerate(wanted) if media.words]
        if not chosen:
            return
        device = next(self.made.model.parameters()).device
        captions = [wanted[i].words for i in chosen]
        for score, media in ((self.made, made), (self.truth, wanted)):
            pictures = [self.pictures(media[i])["pixels"].to(device) for i in chosen]
            score.update(pictures, captions)
        self.count.update(len(chosen))

    def compute(self) -> dict[str, float]:
        made, truth, count = (m.compute() for m in (self.made, self.truth, self.count))
        return {"clip_score": float(made), "clip_score_truth": float(truth)} if count else {}


class _Features(nn.Module):
    """CLIP as torchmetrics expects it: projected features, not outputs that hold them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixels).pooler_output

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.get_text_features(ids, attention_mask=mask).pooler_output


class _Inputs:
    """Its processor: pictures come prepared; captions are cut so that they keep their end token,
    whose state is the text's.
    """

    def __init__(self, tokenizer: Any, config: Any) -> None:
        self._tokenizer, self._length = tokenizer, int(config.max_position_embeddings)

    def __call__(self, **given: Any) -> Any:
        if "images" in given:
            return {"pixel_values": torch.stack(given["images"])}
        options = {"padding": True, "truncation": True, "max_length": self._length}
        return self._tokenizer(given["text"], return_tensors="pt", **options)
