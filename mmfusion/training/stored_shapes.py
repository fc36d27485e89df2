"""What the parts of a recipe give for an item, known before anything is loaded: what stored
features are said to be is compared with it, so that those of a stranger are refused by name and not
by a layer that cannot take them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from mmfusion.models.encoders.base import Encoder
from mmfusion.models.generators.base import VAE, Generator
from mmfusion.models.generators.stored import MASK, MEAN, POOLED, STD, TOKENS
from mmfusion.processing.stored import FEATURES, Spec

Shape = tuple[int | None, ...]


def shapes_of(part: Encoder | Generator, of: str = "") -> dict[str, Shape]:
    """Shapes of a part's tensors of an item (None: a length that differs between items), without
    the mask that some text encodings have.

    Args:
        part: not built.
        of: of a generator, which part of it.
    """
    if isinstance(part, Encoder):
        return {FEATURES: (None, part.out_dim)}
    if of == VAE:
        return dict.fromkeys((MEAN, STD), _latents(part))
    spec = part.spec
    pooled = {POOLED: (spec.pooled_dim,)} if spec.pooled_dim else {}
    return {TOKENS: (spec.tokens, spec.dim), **pooled}


def _latents(generator: Generator) -> Shape:
    """Of one target, by a VAE without values."""
    processor = generator.target_processor()
    with torch.device("meta"), torch.no_grad():
        twin = copy.deepcopy(generator)
        twin.build({VAE}, pretrained=False)
        mean, _ = twin.moments(processor.collate([processor.idle()]))
    return tuple(mean.shape[1:])


def misfit(specs: Mapping[str, Spec], shapes: Mapping[str, Shape]) -> str | None:
    """How the tensors that a set is said to hold differ from what the part gives; None: they do
    not.
    """
    wanted = dict(shapes)
    if TOKENS in wanted and MASK in specs:
        wanted[MASK] = wanted[TOKENS][:1]
    types = {name: (dtype == "BOOL") == (name == MASK) for name, (dtype, _) in specs.items()}
    if {name: shape for name, (_, shape) in specs.items()} == wanted and all(types.values()):
        return None
    return f"{dict(specs)}, expected numbers of the shapes {wanted} (None: any length)"
