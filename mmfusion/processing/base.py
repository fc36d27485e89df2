"""The media processor: from an encoded file to the tensors its encoder takes. Each lives in its
encoder's file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from mmfusion.types import Media, MediaTensors


class MediaProcessor(ABC):
    """Decodes and prepares one modality for one encoder. Picklable: it runs in loader processes.

    Every method raises :class:`mmfusion.types.DataError` for media that cannot be used. Where the
    number of features differs between items, ``__call__`` also puts the number it really decoded
    under ``num_features`` (() int64): it is compared with the planned one.
    """

    modality: str

    @abstractmethod
    def num_features(self, media: Media) -> int:
        """Features F the encoder will give for this item, from its header, without decoding."""

    @abstractmethod
    def __call__(self, media: Media, rng: np.random.Generator | None = None) -> MediaTensors:
        """Decode and prepare one item.

        Args:
            media: the encoded file.
            rng: draws for augmentation, keyed by (seed, source, epoch, sample); None means none.
        """

    @abstractmethod
    def idle(self) -> MediaTensors:
        """The smallest valid item, standing in where a batch has no item of this modality."""

    def collate(self, items: Sequence[MediaTensors]) -> MediaTensors:
        """Join N items into tensors with a leading N. Override where items differ in size (then
        pad).
        """
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}
