"""A classifier, trained on true media only, tells what the made ones show."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn
from torchmetrics import MeanMetric

from mmfusion.metrics.judges.base import Judge
from mmfusion.types import DataError, Media

WHOLE = "all"


class ClassifierJudge(Judge):
    """``right/<aspect>``: the share of made media in which the classifier sees what was wanted, for
    each aspect (``color``, ``shape``) and, as ``right/all``, in all aspects at once;
    ``right_truth/...``: the same of the true media, which is what the classifier itself is worth.
    A medium that cannot be decoded is not right.

    Args:
        aspects: what it tells of a medium.
    """

    def __init__(self, aspects: Sequence[str]) -> None:
        super().__init__()
        if not aspects or WHOLE in aspects:
            raise ValueError(f"aspects is {list(aspects)}; expected one or more, none of them all.")
        self.aspects = tuple(aspects)
        self.shares = nn.ModuleDict({
            f"{kind}/{aspect}": MeanMetric()
            for kind in ("right", "right_truth")
            for aspect in (*aspects, WHOLE)
        })  # fmt: skip

    @abstractmethod
    def labels(self, wanted: Media) -> Mapping[str, str] | None:
        """What a medium should show, from the true medium's caption; a label for each aspect, or
        None where it is not known.
        """

    @abstractmethod
    def classify(self, media: Sequence[Media]) -> Sequence[Mapping[str, str]]:
        """What the classifier sees in each medium: a label for each aspect."""

    def told(self, media: Sequence[Media]) -> list[Mapping[str, str]]:
        """As :meth:`classify`; nothing is seen in a medium that cannot be decoded, as a made sound
        that is silent.
        """
        try:
            return [*self.classify(media)]
        except DataError:
            if len(media) == 1:
                return [{}]
            return [one for medium in media for one in self.told([medium])]

    @torch.no_grad()
    def update(self, made: Sequence[Media], wanted: Sequence[Media]) -> None:
        labels = [self.labels(medium) for medium in wanted]
        known = [i for i, label in enumerate(labels) if label is not None]
        if not known:
            return
        for kind, media in (("right", made), ("right_truth", wanted)):
            found = self.told([media[i] for i in known])
            for i, seen in zip(known, found, strict=True):
                label = labels[i] or {}
                right = {aspect: seen.get(aspect) == label[aspect] for aspect in self.aspects}
                for aspect, is_right in {**right, WHOLE: all(right.values())}.items():
                    self._share(f"{kind}/{aspect}").update(float(is_right))

    def compute(self) -> dict[str, float]:
        found = {name: float(self._share(name).compute()) for name in self.shares}
        return {name: share for name, share in found.items() if not math.isnan(share)}

    def _share(self, name: str) -> MeanMetric:
        return cast(MeanMetric, self.shares[name])
