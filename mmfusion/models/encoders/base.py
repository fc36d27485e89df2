"""The modality encoder: media tensors to features (N, F, D_m)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from mmfusion.models.loading import fetching
from mmfusion.processing.base import MediaProcessor
from mmfusion.types import MediaTensors


def read_config(path: str, revision: str | None = None) -> Any:
    """The transformers configuration of a hub id or folder.

    Raises:
        ValueError: for a model that only code of its own can make: such code is never run.
    """
    try:
        with fetching(path):
            return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except ValueError as error:
        settings, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        if "auto_map" not in settings:
            raise
        raise ValueError(
            f"{path} brings code of its own (auto_map in its config.json), which is never run; "
            "write an encoder for it (docs/extending.md)."
        ) from error


class Encoder(nn.Module, ABC):
    """One pretrained encoder. The constructor reads configuration only; ``build`` makes the modules
    and loads weights.

    So a recipe can be parsed, described and its processor made without a single weight, and the
    modules come to life inside Lightning's ``configure_model``, as sharded strategies need.
    """

    @property
    @abstractmethod
    def out_dim(self) -> int:
        """Width D_m of a feature. Known before ``build``."""

    @abstractmethod
    def build(self, pretrained: bool = True) -> None:
        """Make the modules; with ``pretrained`` load every weight, failing if one is missing, else
        initialise at random.
        """

    @abstractmethod
    def media_processor(self) -> MediaProcessor:
        """The processor that feeds this encoder. Works before ``build``."""

    @abstractmethod
    def forward(self, tensors: MediaTensors) -> Tensor:
        """Encode N items.

        Returns:
            (N, F, D_m); rows with fewer than F valid features are padded at the end.
        """

    def train(self, mode: bool = True) -> Any:
        """A frozen encoder stays in evaluation mode: its dropout must not act. Batch normalisation
        does so in a trained one too: its statistics would take in idle items, and differ by rank.
        """
        super().train(mode and any(p.requires_grad for p in self.parameters()))
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self
