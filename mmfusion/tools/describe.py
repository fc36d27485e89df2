"""``mmfusion describe RECIPE``: parts, shapes, parameters, tokens and memory, without weights.

Modules are made on torch's meta device: sizes without values, so no weight file is read.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import av
import numpy as np
import soundfile
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn

from mmfusion import tuning
from mmfusion.audit import audit
from mmfusion.models import quantised
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.encoders.base import Encoder
from mmfusion.models.projectors.base import Projector
from mmfusion.training.command import RecipeCommand
from mmfusion.types import DataError, Media

ADAM_BYTES = 8
"""AdamW keeps two fp32 numbers for each parameter that trains."""
LAYER_ACTIVATIONS = 17
"""Numbers that a transformer layer keeps for its backward pass, in units of tokens x hidden
(arXiv:2205.05198, eq. 1: 34 bytes at 2 bytes each, without the attention matrix)."""
LEFT_OUT = (
    "Not counted: the interpreter and its libraries, kernels' caches and workspaces, the loss's "
    "chunk of logits, activations of encoders and projectors, judges, and loader processes."
)
"""What comes on top of the table of memory."""
_MEDIA_PARTS = ("encoders", "input_projectors")


@dataclass(frozen=True)
class PartRow:
    """One part of the model; sizes in bytes."""

    name: str
    kind: str
    parameters: int
    trainable: int
    dtypes: str
    tuning: str
    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class MediaRow:
    """What an example item becomes."""

    modality: str
    example: str
    features: tuple[int, int]
    tokens: tuple[int, int]


@dataclass(frozen=True)
class MadeRow:
    """What stands for an item of an answer, and what its generator takes."""

    modality: str
    signal_tokens: int
    conditioning: str


@dataclass(frozen=True)
class Description:
    """Everything the command prints.

    Attributes:
        activations: bytes kept for the backward pass of one micro-batch, roughly.
        tokens: of a micro-batch.
        audit: what the audit before step 1 will refuse, or "".
    """

    parts: list[PartRow]
    media: list[MediaRow]
    made: list[MadeRow]
    activations: int
    tokens: int
    audit: str

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by purpose, of one process that holds everything."""
        sums = {
            name: sum(getattr(part, name) for part in self.parts)
            for name in ("weights", "gradients", "optimizer")
        }
        return {**sums, "activations": self.activations}


def describe(recipe: str, overrides: list[str] | None = None) -> None:
    """Show the parts of a recipe, their shapes and parameters, and an estimate of the memory.

    Args:
        recipe: the recipe's YAML file, or a run directory; of several files, -c A -c B.
        overrides: a list of keys of the recipe with other values; they may also stand on the
            command line as they do for `mmfusion fit`, e.g. --data.pack_tokens=512.
    """
    found = description(recipe, overrides or [])
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_parts_table(found.parts))
    console.print(_media_table(found.media))
    if found.made:
        console.print(_made_table(found.made))
    console.print(_memory_table(found))
    console.print(LEFT_OUT, soft_wrap=True)
    if found.audit:
        console.print(f"[bold red]fit will refuse this recipe:[/] {found.audit}", soft_wrap=True)


def description(recipe: str, overrides: Sequence[str] = ()) -> Description:
    """Describe a recipe; raises as `mmfusion fit` would where it cannot be parsed."""
    command = RecipeCommand("", ["--config", recipe, *overrides])
    module, data = command.model, command.datamodule
    model: AnyToAnyModel = module.model
    if data.val_sources:
        for validation in command.validations:
            validation.need(model)
    with torch.device("meta"):
        model.build(pretrained=False)
        groups = tuning.apply(model, module.tuning)
    media = [_media_row(model, modality) for modality in model.encoders]
    tokens = data.pack_tokens * min(data.packs_per_micro_batch, data.packs_per_step)
    half = "16" in str(command.config.trainer.precision) or any(
        parameter.element_size() == 2 for parameter in model.llm.parameters()
    )
    return Description(
        parts=[_part_row(name, part, groups) for name, part in model.parts()],
        media=media,
        made=[_made_row(model, modality) for modality in model.generators],
        activations=_activations(model, tokens, 2 if half else 4),
        tokens=tokens,
        audit=_refusal(model, groups, module.init_from),
    )


def _refusal(model: AnyToAnyModel, groups: Any, init_from: str | None) -> str:
    try:
        # What init_from holds is in its checkpoint, which is not read here.
        loaded = [name for name, _ in model.named_parameters()] if init_from else []
        audit(model, groups, loaded)
    except tuning.TuningError as error:
        return str(error)
    return ""


def _part_row(name: str, part: nn.Module, groups: Sequence[tuning.ParamGroup]) -> PartRow:
    parameters = list(part.parameters())
    trains = [p for p in parameters if p.requires_grad]
    own = set(trains)
    policies = {
        f"{group['name'].removesuffix('/no_decay').rpartition('/')[2]} {group['lr']:g}": None
        for group in groups
        if own & set(group["params"])
    }
    tensors = [*parameters, *part.buffers()]
    return PartRow(
        name=name,
        kind=type(part).__name__,
        parameters=sum(map(quantised.count, parameters)),
        trainable=sum(p.numel() for p in trains),
        dtypes=", ".join(dict.fromkeys(map(quantised.precision, parameters))),
        tuning=", ".join(policies) or "Frozen",
        weights=sum(t.numel() * t.element_size() for t in tensors),
        gradients=sum(p.numel() * p.element_size() for p in trains),
        optimizer=sum(p.numel() * ADAM_BYTES for p in trains),
    )


def _media_row(model: AnyToAnyModel, modality: str) -> MediaRow:
    processor = model.processor()
    example, media = EXAMPLES.get(modality, ("", _nothing))
    encoder, projector = (model.get_submodule(f"{kind}.{modality}") for kind in _MEDIA_PARTS)
    widths = (cast(Encoder, encoder).out_dim, model.llm.hidden_dim)
    try:
        features = processor.media[modality].num_features(media())
    except DataError as error:
        return MediaRow(modality, f"{example}: {error}", (0, widths[0]), (0, widths[1]))
    tokens = cast(Projector, projector).num_tokens(features)
    return MediaRow(modality, example, (features, widths[0]), (tokens, widths[1]))


def _made_row(model: AnyToAnyModel, modality: str) -> MadeRow:
    spec = model.generator(modality).spec
    pooled = f" and {spec.pooled_dim}" if spec.pooled_dim else ""
    return MadeRow(modality, model.signal_tokens[modality], f"{spec.tokens} x {spec.dim}{pooled}")


def _activations(model: AnyToAnyModel, tokens: int, element: int) -> int:
    """Of the LLM, which holds nearly all of them; 0 where no gradient passes through it."""
    if not any(p.requires_grad for p in model.parameters()):
        return 0
    config = getattr(model.llm, "config", None)
    text = config.get_text_config() if config is not None else None
    layers = int(getattr(text, "num_hidden_layers", 0))
    row = tokens * model.llm.hidden_dim * element
    if getattr(model.llm, "gradient_checkpointing", False):
        return row * (layers + LAYER_ACTIVATIONS)
    return row * layers * LAYER_ACTIVATIONS


# ---- example media


def _image() -> Media:
    file = io.BytesIO()
    Image.new("RGB", (640, 480)).save(file, "jpeg")
    return Media("image", file.getvalue(), "jpg")


def _audio() -> Media:
    file = io.BytesIO()
    soundfile.write(file, np.linspace(-0.5, 0.5, 160000, dtype=np.float32), 16000, format="wav")
    return Media("audio", file.getvalue(), "wav")


def _video() -> Media:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        for index in range(100):
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Media("video", file.getvalue(), "mp4")


def _nothing() -> Media:
    raise DataError("unknown", "no example of this modality")


EXAMPLES: dict[str, tuple[str, Callable[[], Media]]] = {
    "image": ("640 x 480 pixels", _image),
    "audio": ("10 s", _audio),
    "video": ("10 s at 10 frames/s", _video),
}
"""What each is, and a function that makes it."""


# ---- tables


def _parts_table(parts: Sequence[PartRow]) -> Table:
    table = Table(title="Parts", title_justify="left")
    for column in ("part", "class"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "trainable"):
        table.add_column(column, justify="right")
    for column in ("dtype", "tuning, lr"):
        table.add_column(column)
    for part in parts:
        table.add_row(
            part.name,
            part.kind,
            f"{part.parameters:,}",
            f"{part.trainable:,}",
            part.dtypes or "-",
            part.tuning,
        )
    table.add_section()
    total, trains = (sum(getattr(p, n) for p in parts) for n in ("parameters", "trainable"))
    table.add_row("all", "", f"{total:,}", f"{trains:,}", "", "")
    return table


def _media_table(media: Sequence[MediaRow]) -> Table:
    table = Table(title="Media", title_justify="left")
    for column in ("modality", "example", "encoder features", "LLM tokens"):
        table.add_column(column)
    for row in media:
        table.add_row(
            row.modality,
            row.example,
            f"{row.features[0]} x {row.features[1]}",
            f"{row.tokens[0]} x {row.tokens[1]}",
        )
    return table


def _made_table(made: Sequence[MadeRow]) -> Table:
    table = Table(title="Media of answers", title_justify="left")
    for column in ("modality", "signal tokens", "conditioning of the generator"):
        table.add_column(column)
    for row in made:
        table.add_row(row.modality, str(row.signal_tokens), row.conditioning)
    return table


def _memory_table(found: Description) -> Table:
    table = Table(title="Memory of one process, without sharding", title_justify="left")
    table.add_column("for")
    table.add_column("MiB", justify="right")
    for name, size in found.memory.items():
        note = f" (roughly, {found.tokens:,} tokens)" if name == "activations" else ""
        table.add_row(name + note, f"{size / 2**20:,.1f}")
    table.add_section()
    table.add_row("all", f"{sum(found.memory.values()) / 2**20:,.1f}")
    return table
