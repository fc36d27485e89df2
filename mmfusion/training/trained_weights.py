"""Trained weights, from a checkpoint into a module that is built: those of an earlier stage, which
may have more and other parts, and those of this recipe, where a run goes on or is used.

Trained weights are never dropped without a word, and none is taken for what it is not: names,
shapes, scales of adapters and new tokens are compared first.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmfusion.kept_weights import check_meaning, meaning, take_rows
from mmfusion.training import manifest, sharded
from mmfusion.training.checkpoint import (
    kept_state,
    load_kept,
    read_checkpoint,
    trained_names,
    unused_names,
)
from mmfusion.training.frozen_weights import fingerprints, other_weights
from mmfusion.training.resume import complete_checkpoint
from mmfusion.training.sharded import renamed

if TYPE_CHECKING:
    from mmfusion.training.module import MultimodalModule
    from mmfusion.training.strategies.shares import GatheredCheckpoints

log = logging.getLogger(__name__)

MEANING = "meaning"
"""Where a checkpoint keeps what its weights mean besides their shapes."""
ORDER = "parameter_names"
"""Where it keeps the names of the optimizer's parameters, whose state is kept by position."""


def keep_trained(module: MultimodalModule, checkpoint: dict[str, Any]) -> None:
    """Keep only what trains now or trained in an earlier stage, and what it means."""
    names = trained_names(module) | module.inherited
    checkpoint["state_dict"] = kept_state(checkpoint["state_dict"], names)
    checkpoint[ORDER] = _group_names(module)
    checkpoint[MEANING] = meaning(module.model)


def load_earlier(
    module: MultimodalModule,
    init_from: str,
    dropped: Sequence[str],
    strategy: GatheredCheckpoints | None = None,
) -> set[str]:
    """Load what an earlier stage trained.

    Args:
        module: built, tuning applied.
        init_from: the earlier run, or one of its checkpoints.
        dropped: parts whose weights are left behind.
        strategy: of a run whose ranks divide the LLM layer by layer, and load it as they do.

    Returns:
        Names of the weights that were loaded, or will be.

    Raises:
        ValueError: where a weight has no place here or another shape, ``dropped`` names a part that
            has none there, or weights mean something else here.
    """
    path = complete_checkpoint(init_from, "model.init_from")
    checkpoint = read_checkpoint(path, unread=True)
    check_meaning(module.model, checkpoint.get(MEANING, {}), dropped)
    state = _without(dropped, checkpoint["state_dict"], path)
    later = strategy.loaded_later(module) if strategy is not None else set()
    found = load_kept(module, state, str(path), later)
    if strategy is not None:
        strategy.load_later(renamed(state, {name: found[name] for name in later & set(found)}))
    loaded = set(found) | take_rows(module, set(found))
    log.info("%d tensors from %s", len(loaded), path)
    if unused := unused_names(module, state):
        parts = ", ".join(_parts_of(unused))
        raise ValueError(
            f"{len(unused)} trained tensors of {path} have no place here: {unused[:4]}. Add the "
            f"parts and adapters they belong to, of {parts}: in model.tuning, mmfusion.tuning.LoRA "
            "with train: false keeps adapters frozen, and any policy for a part of a generator "
            "(mmfusion.tuning.Frozen too) has it built. Or leave their part behind by "
            "model.init_drop. What a part gives that an earlier stage trained cannot be stored "
            "(data.features)."
        )
    return loaded


def _parts_of(names: Sequence[str]) -> list[str]:
    """Keys of ``model.tuning`` for tensors: ``llm``, ``encoders.image``,
    ``generators.image.denoiser``.
    """
    depths = {"llm": 1, "generators": 3}
    found = (name.removeprefix("model.").split(".") for name in names)
    return sorted({".".join(keys[: depths.get(keys[0], 2)]) for keys in found})


def _without(
    dropped: Sequence[str], state: Mapping[str, Tensor], path: Path
) -> Mapping[str, Tensor]:
    for part in dropped:
        left = [name for name in state if not name.startswith(f"model.{part}.")]
        if len(left) == len(state):
            raise ValueError(
                f"model.init_drop names {part!r}, but {path} has no weights of it; it has "
                f"{sorted(state)[:4]}."
            )
        state = renamed(state, {name: name for name in left})
    return state


def load_own(module: MultimodalModule, path: str | Path) -> None:
    """Load a checkpoint of this recipe, to use or evaluate it; frozen weights that are others than
    it was trained with are told.
    """
    checkpoint = read_checkpoint(path)
    check_own(module, checkpoint)
    load_kept(module, checkpoint["state_dict"], str(path))
    module.inherited = set(checkpoint["state_dict"]) - trained_names(module)
    if (made := manifest.read(path)) is not None:
        for line in other_weights(made.about.get("frozen", {}), fingerprints(module)):
            log.warning("%s was trained with other frozen weights: %s", path, line)


def check_own(module: MultimodalModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks a weight that trains here, holds one with no place here, or
    one that means something else.
    """
    check_meaning(module.model, checkpoint.get(MEANING, {}), ())
    there = set(checkpoint["state_dict"])
    if missing := sorted(trained_names(module) - there):
        raise ValueError(
            f"the checkpoint has no weights for {len(missing)} tensors that train here: "
            f"{missing[:4]}. It was made with another model.tuning."
        )
    own, shapes = module.state_dict(), sharded.shapes(checkpoint["state_dict"])
    if surplus := sorted(there - set(own)):
        raise ValueError(
            f"{len(surplus)} tensors of the checkpoint have no place here: {surplus[:4]}. It "
            "was made with other parts or another model.tuning."
        )
    wrong = [
        f"{name}: {tuple(shapes[name].shape)} there, {tuple(own[name].shape)} here"
        for name in sorted(there)
        if shapes[name].shape != own[name].shape
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors of the checkpoint have another shape in this recipe: "
            f"{', '.join(wrong[:4])}. It was made with other parts or another model.tuning."
        )


def check_order(module: MultimodalModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse the state of an optimizer that held other parameters, or in another order."""
    here = _group_names(module)
    if (there := checkpoint.get(ORDER, here)) != here:
        raise ValueError(
            "the optimizer's state in the checkpoint is of other parameters, or of the same in "
            f"another order: {_first_difference(there, here)}. Write model.encoders, "
            "model.input_projectors and model.tuning in the order the run started with."
        )


def _group_names(module: MultimodalModule) -> list[list[str]]:
    """Names of the parameters of each optimizer group."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in module.groups]


def _first_difference(there: list[list[str]], here: list[list[str]]) -> str:
    pairs = zip_longest(chain(*there), chain(*here), fillvalue="nothing")
    differing = [f"{a} there, {b} here" for a, b in pairs if a != b]
    return differing[0] if differing else "their groups (weight_decay) differ"
