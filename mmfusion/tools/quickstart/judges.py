"""Classifiers that tell what media show, trained on true media only; they judge the made ones.

They share nothing with the generators but the data: not a weight, not an encoder.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmfusion.data.converters.text_to_media import TextToMedia
from mmfusion.data.source import Source
from mmfusion.metrics.judges.classifier import ClassifierJudge
from mmfusion.models.generators.clips import ClipProcessor
from mmfusion.models.generators.pictures import SquareProcessor
from mmfusion.models.generators.sounds import MelProcessor
from mmfusion.paths import cache_dir, expand
from mmfusion.processing.base import MediaProcessor
from mmfusion.tools.quickstart.folders import make_folder
from mmfusion.tools.quickstart.pictures import MOTIONS
from mmfusion.tools.quickstart.sounds import KINDS
from mmfusion.training.generator_fits import Effort, Fit, run_fit
from mmfusion.types import Media

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
WEIGHTS = "judge.safetensors"
VERSION = 1
"""Raise it when a judge changes: it is then trained again."""


class SmallJudge(ClassifierJudge):
    """A convolutional network with one output for each aspect.

    Args:
        path: its weights, a safetensors file.

    Attributes:
        tells: the labels of each aspect.
        channels: of what it sees.
        pools: for each of its layers, how far the next one sees less.
        tensor: of what the processor gives.
    """

    tells: ClassVar[Mapping[str, Sequence[str]]]
    channels: ClassVar[int]
    pools: ClassVar[Sequence[Any]]
    tensor: ClassVar[str]

    def __init__(self, path: str) -> None:
        super().__init__(list(self.tells))
        self.path = path
        self.net: nn.Module = network(
            self.channels, self.pools, sum(len(labels) for labels in self.tells.values())
        )

    @abstractmethod
    def processor(self) -> MediaProcessor:
        """From media to what it sees."""

    @abstractmethod
    def seen(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(M, channels, ...) of processed media."""

    def disturbed(self, seen: Tensor) -> Tensor:
        """Media in training, with a little noise: what is made is never as clean."""
        level = 0.1 * torch.rand(len(seen), *[1] * (seen.ndim - 1), device=seen.device)
        return seen + level * torch.randn_like(seen)

    def build(self) -> None:
        weights = load_file(expand(self.path))
        self.net.load_state_dict({name.removeprefix("net."): x for name, x in weights.items()})
        self.requires_grad_(False).eval()

    def outputs(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """(M, labels) for each aspect."""
        device = next(self.net.parameters()).device
        found = self.net(self.seen(tensors).to(device))
        return list(found.split([len(labels) for labels in self.tells.values()], dim=1))

    def classify(self, media: Sequence[Media]) -> list[dict[str, str]]:
        processor = self.processor()
        tensors = processor.collate([processor(medium) for medium in media])
        chosen = [found.argmax(1).tolist() for found in self.outputs(tensors)]
        names = list(self.tells.items())
        return [
            {aspect: labels[i] for (aspect, labels), i in zip(names, row, strict=True)}
            for row in zip(*chosen, strict=True)
        ]


class ShapeJudge(SmallJudge):
    """Color and shape of a picture of 32 pixels."""

    tells = {"color": COLORS, "shape": SHAPES}
    channels, pools, tensor = 3, ((2, 2), (2, 2), (2, 2)), "pixels"

    def processor(self) -> MediaProcessor:
        return SquareProcessor(32)

    def seen(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["pixels"].float() / 127.5 - 1

    def labels(self, wanted: Media) -> dict[str, str] | None:
        words = (wanted.caption or "").lower().rstrip(".").split()
        colors, shapes = set(words) & set(COLORS), set(words) & set(SHAPES)
        if len(colors) != 1 or len(shapes) != 1:
            return None
        return {"color": colors.pop(), "shape": shapes.pop()}


class SoundJudge(SmallJudge):
    """What is heard."""

    tells = {"sound": tuple(KINDS)}
    channels, pools, tensor = 1, ((2, 2), (2, 2), (2, 2)), "mel"

    def processor(self) -> MediaProcessor:
        return MelProcessor(16000, 160, 96, 64, 1024)

    def seen(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["mel"][:, None] / 4 + 1

    def disturbed(self, seen: Tensor) -> Tensor:
        """With a hiss of any loudness and color below the sound."""
        size = (len(seen), 1, 1, 1)
        loudness = -10 + 7 * torch.rand(size, device=seen.device)
        slope = torch.linspace(-1, 1, seen.shape[-1], device=seen.device)
        color = 2 * torch.randn(size, device=seen.device) * slope
        hiss = loudness + color + 0.5 * torch.randn_like(seen)
        return torch.logaddexp(4 * (seen - 1), hiss) / 4 + 1

    def labels(self, wanted: Media) -> dict[str, str] | None:
        name = (wanted.caption or "").lower().rstrip(".")
        return {"sound": name} if name in KINDS else None


class MotionJudge(SmallJudge):
    """What the thing in a clip does."""

    tells = {"motion": tuple(MOTIONS)}
    channels, pools, tensor = 3, ((1, 2, 2), (1, 2, 2), (2, 2, 2)), "pixels"

    def processor(self) -> MediaProcessor:
        return ClipProcessor(32, 32, 8, 4.0)

    def seen(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["pixels"].transpose(1, 2).float() / 127.5 - 1

    def labels(self, wanted: Media) -> dict[str, str] | None:
        caption = (wanted.caption or "").lower().rstrip(".")
        found = [motion for motion, words in MOTIONS.items() if caption.endswith(words)]
        return {"motion": found[0]} if found else None


def network(channels: int, pools: Sequence[tuple[int, ...]], outputs: int) -> nn.Sequential:
    """Convolutions over two or three axes, with the largest value of each feature at the end."""
    axes = len(pools[0])
    conv: Any = (nn.Conv2d, nn.Conv3d)[axes - 2]
    norm: Any = (nn.BatchNorm2d, nn.BatchNorm3d)[axes - 2]
    pool: Any = (nn.MaxPool2d, nn.MaxPool3d)[axes - 2]
    last: Any = (nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)[axes - 2]
    layers: list[nn.Module] = []
    width = 16
    for size in pools:
        layers += [conv(channels, width, 3, padding=1, bias=False), norm(width), nn.ReLU()]
        layers.append(pool(size))
        channels, width = width, 2 * width
    layers += [conv(channels, channels, 3, padding=1), nn.ReLU(), last(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, outputs))


class JudgeFit(Fit):
    """Cross entropy of every aspect, on disturbed media."""

    def __init__(self, effort: Effort, judge: SmallJudge) -> None:
        super().__init__(effort)
        self.net = judge.net.requires_grad_(True)
        self._judge = [judge]  # not a part: it holds metrics, and stays in evaluation mode

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Of ``seen`` and the labels of each aspect."""
        (judge,) = self._judge
        found = self.net(judge.disturbed(batch["seen"]))
        parts = found.split([len(labels) for labels in judge.tells.values()], dim=1)
        losses = [F.cross_entropy(x, batch[a]) for x, a in zip(parts, judge.tells, strict=True)]
        return torch.stack(losses).sum()


def train_judge(judge: SmallJudge, source: Source, effort: Effort, file: Path) -> None:
    """Train on true media, and save the weights."""
    torch.manual_seed(0)
    for module in judge.net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    media = list(true_media(source))
    processor = judge.processor()
    tensors = processor.collate([processor(medium) for medium in media])
    labels = [judge.labels(medium) or {} for medium in media]
    items = {"seen": judge.seen(tensors)}
    for aspect, names in judge.tells.items():
        items[aspect] = torch.tensor([names.index(label[aspect]) for label in labels])
    run_fit(JudgeFit(effort, judge), items, file.parent / "losses", seed=0)
    save_file(judge.net.state_dict(prefix="net."), file)


def true_media(source: Source) -> Iterator[Media]:
    """The media of a source's answers."""
    for index in range(len(source)):
        yield from source[index].targets


JUDGES: dict[str, tuple[type[SmallJudge], str, Effort]] = {
    "image": (ShapeJudge, "drawings", Effort(300, 64, 5e-3)),
    "audio": (SoundJudge, "sounds", Effort(300, 32, 5e-3)),
    "video": (MotionJudge, "clips", Effort(600, 16, 3e-3)),
}
"""The judge of each modality, the data set it is trained on, and how long."""


def make_judges(small: bool = False) -> dict[str, SmallJudge]:
    """One for each modality, trained where it is not yet there; with ``small`` in a tenth of the
    steps.
    """
    found = {}
    data = cache_dir() / "media_data"
    sets = json.loads((data / "origin.json").read_text())
    for modality, (kind, name, effort) in JUDGES.items():
        source = Source(
            str(data / name / "train-*.tar"), TextToMedia(prompts={modality: ["{caption}"]})
        )
        if small:
            effort = replace(effort, steps=effort.steps // 10)
        origin = {"data": sets, "effort": repr(effort), "version": VERSION}
        folder = make_folder(
            cache_dir() / "judges" / (f"{modality}-small" if small else modality),
            origin,
            partial(_train_into, kind, source, effort),
        )
        found[modality] = kind(str(folder / WEIGHTS))
        found[modality].build()
    return found


def _train_into(kind: type[SmallJudge], source: Source, effort: Effort, folder: Path) -> None:
    file = folder / WEIGHTS
    train_judge(kind(str(file)), source, effort, file)
