"""A recipe, planned: built without weights, rehearsed on its first micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmfusion import tuning
from mmfusion.audit import audit
from mmfusion.tools.plan.chosen import chosen, made, title, unknown, why_refused
from mmfusion.tools.plan.micro_batches import Given, made_up, micro_batches
from mmfusion.tools.plan.rehearsal import Rehearsal, rehearse
from mmfusion.tools.plan.sequence import RehearsedGroup
from mmfusion.tools.plan.sizes import Sizes, sizes
from mmfusion.training.checkpoint import read_checkpoint, trained_names
from mmfusion.training.command import RecipeCommand
from mmfusion.training.module import MultimodalModule
from mmfusion.training.resume import complete_checkpoint
from mmfusion.training.strategies.fsdp2 import FSDP2
from mmfusion.training.strategies.names import OURS
from mmfusion.training.strategies.shares import divide
from mmfusion.training.strategies.tensor import divided_weights

LLM = "llm"
ALIASES = {"None": "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Lightning's other names of precisions."""


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
        strategy: the recipe's own, as :func:`mmfusion.tools.plan.chosen.chosen` gives it.
        own_sizes: of the weights as that one divides them.
        refused: what strategies say of the recipe, by their title, where they do not take it.
    """

    sizes: Sizes
    seen: Rehearsal
    given: Given
    frozen_parts: set[str]
    steps: int | None
    inherited: int
    notes: list[str]
    strategy: Any
    own_sizes: Sizes
    refused: Mapping[str, str]


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
    strategy, precision = chosen(command), precision_of(command)
    notes += unknown(strategy)
    refused = {
        title(one): why
        for one in (*map(made, OURS), strategy)
        if (why := why_refused(one, module, precision))
    }
    found, inherited = sizes(module), _inherited(module)
    own = found if title(strategy) in refused else _as_divided(module, strategy)
    frozen = {
        name
        for name, part in module.model.parts()
        if not any(p.requires_grad for p in part.parameters())
    }
    splits = data.micro_batches_per_step(world)
    batches, sharing = given.batches, int(command.config.sequence_parallel)
    if sharing > 1:
        module.model.sequence_group = RehearsedGroup(sharing)
        batches = [module.own_part(batch) for batch in batches]
    seen = rehearse(module, batches, precision, splits > 1, on_gpu)
    # Ranks that compute the LLM's layers together compute everything else alike.
    alike = data.ranks_per_pack // sharing
    flops = {
        (phase, part): sharing * (1 if part == LLM else alike) * one
        for (phase, part), one in seen.flops.items()
    }
    seen, steps = replace(seen, flops=flops), _steps(command, given)
    return Planned(
        found, seen, given, frozen, steps, inherited, notes, strategy, own, refused
    )  # fmt: skip


def precision_of(command: RecipeCommand) -> str:
    """``trainer.precision`` by its long name."""
    given = str(command.config.trainer.precision)
    return ALIASES.get(given, given)


def _as_divided(module: MultimodalModule, strategy: Any) -> Sizes:
    """Of the weights as a strategy divides them; the module is told what it divides."""
    asked = [getattr(strategy, name, False) for name in ("divide_encoders", "divide_denoisers")]
    divide(module, *asked)
    together = strategy.tensor_parallel if isinstance(strategy, FSDP2) else 1
    shared = divided_weights(module.model.llm, together) if together > 1 else set()
    return sizes(module, together, shared)


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
