"""In place of a frozen encoder whose features are stored (``mmfusion data encode``): nothing is
built, the features come with the batch.
"""

from __future__ import annotations

from torch import Tensor

from mmfusion.models.encoders.base import Encoder
from mmfusion.processing.base import MediaProcessor
from mmfusion.processing.stored import FEATURES
from mmfusion.types import MediaTensors


class StoredEncoder(Encoder):
    """Passes stored features on.

    Args:
        encoder: whose features they are; it is not built.
        processor: reads them.
    """

    def __init__(self, encoder: Encoder, processor: MediaProcessor) -> None:
        super().__init__()
        self._out_dim, self._processor = encoder.out_dim, processor

    @property
    def out_dim(self) -> int:
        return self._out_dim

    def build(self, pretrained: bool = True) -> None:
        """There is nothing to build."""

    def media_processor(self) -> MediaProcessor:
        return self._processor

    def forward(self, tensors: MediaTensors) -> Tensor:
        return tensors[FEATURES]
