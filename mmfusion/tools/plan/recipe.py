"""A recipe, planned: built without weights, rehearsed on its first micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mmfusion import tuning
from mmfusion.audit import audit
from mmfusion.tools.plan.micro_batches import Given, made_up, micro_batches
from mmfusion.tools.plan.rehearsal import Rehearsal, rehearse
from mmfusion.tools.plan.sequence import RehearsedGroup
from mmfusion.tools.plan.sizes import Sizes, sizes
from mmfusion.training.checkpoint import read_checkpoint, trained_names
from mmfusion.training.command import RecipeCommand
from mmfusion.training.module import MultimodalModule
from mmfusion.training.resume import complete_checkpoint


@dataclass(frozen=True)
class Planned:
    """What a recipe needs.

    Attributes:
        sizes: of its weights.
        seen: in the rehearsal, of one process.
        given: the micro-batches that were rehearsed.
        frozen_parts: names of parts of which nothing trains.
        steps: optimizer steps of the run, None where it has no end.
        inherited: bytes of what an earlier stage trained and this one keeps.
        notes: what was assumed.
    """

    sizes: Sizes
    seen: Rehearsal
    given: Given
    frozen_parts: set[str]
    steps: int | None
    inherited: int
    notes: list[str]


def plan_recipe(arguments: Sequence[str], world: int, on_gpu: bool = True) -> Planned:
    """Plan a recipe for so many ranks.

    Args:
        arguments: of ``mmfusion fit``.
        world: ranks.
        on_gpu: whether the ranks are GPUs.

    Raises:
        ValueError: where a part cannot be made or run without values, or the audit before step 1
            would refuse the recipe.
    """
    return plan_command(RecipeCommand("", arguments), world, on_gpu)


def plan_command(command: RecipeCommand, world: int, on_gpu: bool = True) -> Planned:
    """As :func:`plan_recipe`, of a command that is parsed."""
    module, data = command.model, command.datamodule
    notes = []
    for validation in command.validations:
        if data.val_sources:
            validation.need(module.model)
    if hasattr(module.model.llm, "attention"):
        # Kernels of flash_attn want values; what they keep is the same.
        module.model.llm.attention = "varlen_sdpa"
    try:
        with torch.device("meta"):
            module.model.build(pretrained=False)
            module.groups = tuning.apply(module.model, module.tuning)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"a part cannot be built without weights ({type(error).__name__}: {error}). Expected: "
            "build(pretrained=False) that works under torch.device('meta'). Do this: mend it; "
            "docs/extending.md says how."
        ) from error
    # What init_from holds is in its checkpoint, which is not read here.
    everything = [name for name, _ in module.model.named_parameters()]
    audit(module.model, module.groups, everything if module.init_from else [])
    processor = module.model.processor()
    try:
        given = micro_batches(data, processor, world)
    except (ValueError, OSError) as error:
        given = made_up(data, processor, world)
        notes.append(
            f"the data cannot be read ({error}); planned with {given.origin}. Other data keep and "
            "compute something else."
        )
    if module.compile_llm:
        notes.append("model.compile fuses operations: activations are a little less than here.")
    found, inherited = sizes(module), _inherited(module)
    frozen = {
        name
        for name, part in module.model.parts()
        if not any(p.requires_grad for p in part.parameters())
    }
    splits = data.micro_batches_per_step(world)
    batches, sharing = given.batches, data.ranks_per_pack
    if sharing > 1:
        module.model.sequence_group = RehearsedGroup(sharing)
        batches = [module.own_part(batch) for batch in batches]
    seen = rehearse(module, batches, str(command.config.trainer.precision), splits > 1, on_gpu)
    seen = replace(seen, flops={key: sharing * one for key, one in seen.flops.items()})
    steps = _steps(command, given)
    return Planned(found, seen, given, frozen, steps, inherited, notes)


def _inherited(module: MultimodalModule) -> int:
    """Bytes that a checkpoint keeps of ``init_from``."""
    if not module.init_from:
        return 0
    try:
        path = complete_checkpoint(module.init_from, "model.init_from")
    except (ValueError, OSError):
        return 0  # a check of its own says so
    state, trained = read_checkpoint(path, "meta")["state_dict"], trained_names(module)
    return sum(x.numel() * x.element_size() for name, x in state.items() if name not in trained)


def _steps(command: RecipeCommand, given: Given) -> int | None:
    """Of the run: ``trainer.max_steps``, or as many as the epochs have."""
    data, most = command.datamodule, int(command.config.trainer.max_steps)
    if data.epochs is None or not given.real:
        return most if most > 0 else None
    packs = len(given.batches) * given.packs
    samples_a_pack = sum(len(batch.samples) for batch in given.batches) / packs
    samples = data.epochs * sum(len(source) for source in data.sources.values() if source.weight)
    steps = math.ceil(samples / samples_a_pack / data.packs_per_step)
    return min(most, steps) if most > 0 else steps
