"""Tensor parallelism: each rank of a group computes a part of every linear layer of the LLM, by the
plan that the LLM's family has in transformers.

``colwise`` layers give each rank some of the outputs (of the attention, some heads), the
``rowwise`` layer after them sums what the ranks have (Megatron-LM, arXiv:1909.08053). Everything
else, losses included, every rank of a group computes alike, on the same packs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mmfusion.models.llms.base import LLM

COLWISE, ROWWISE, ALIKE = "colwise", "rowwise", "replicated_with_grad_allreduce"


def divide_layers(llm: LLM, mesh: DeviceMesh) -> None:
    """Give this rank its part of the LLM's layers.

    Args:
        llm: built, with its adapters.
        mesh: of one dimension.

    Raises:
        ValueError: where the LLM has no plan, or one that cannot be followed.
    """
    for layer, styles in _layers(llm, mesh.size()):
        for place, style in styles.items():
            style.src_data_rank = None  # every rank has read the same weights
            parallelize_module(layer, mesh, {place: style}, src_data_rank=None)


def divided_weights(llm: LLM, size: int) -> set[nn.Parameter]:
    """What :func:`divide_layers` divides among ``size`` ranks; it raises what that raises."""
    found: set[nn.Parameter] = set()
    for layer, styles in _layers(llm, size):
        for place, style in styles.items():
            module = layer.get_submodule(place)
            by_row = isinstance(style, RowwiseParallel)
            found |= {p for name, p in module.named_parameters() if not by_row or name == "weight"}
    return found


def _layers(
    llm: LLM, size: int
) -> Iterator[tuple[nn.Module, dict[str, ColwiseParallel | RowwiseParallel]]]:
    """Each layer, and how its modules are divided, by their names there."""
    plan, name = llm.tensor_plan(size), type(llm).__name__
    if not plan:
        raise ValueError(
            f"tensor_parallel is {size}, but {name} has no plan for it; leave tensor_parallel out."
        )
    if odd := set(plan.values()) - {COLWISE, ROWWISE, ALIKE}:
        raise ValueError(
            f"tensor_parallel is {size}, but the LLM's plan asks for {sorted(odd)}; only "
            f"{COLWISE} and {ROWWISE} layers can be divided so far. Leave tensor_parallel out."
        )
    for layer in llm.layers:
        _refuse_between(layer, plan)
        yield layer, dict(_styles(layer, plan, size))


def _styles(
    layer: nn.Module, plan: Mapping[str, str], size: int
) -> Iterator[tuple[str, ColwiseParallel | RowwiseParallel]]:
    """Of each linear module of a layer that is divided; an adapter follows what it adapts."""
    there = dict(layer.named_modules())
    for name, style in plan.items():
        if (module := there.get(name)) is None:
            continue
        if style == ALIKE:
            _refuse_trained(name, module)
            continue
        if not hasattr(module, "lora_A"):
            yield name, _made(name, module, style, size)
            continue
        if len(getattr(module, "lora_magnitude_vector", ())):
            raise ValueError(
                f"tensor_parallel is {size} and {name} is tuned by DoRA, whose norms need whole "
                "weights; tune it by LoRA without dora."
            )
        adapted: Any = module
        yield f"{name}.base_layer", _made(name, adapted.base_layer, style, size)
        side = "lora_B" if style == COLWISE else "lora_A"
        for adapter, part in getattr(adapted, side).items():
            yield f"{name}.{side}.{adapter}", _made(name, part, style, size)


def _made(name: str, module: nn.Module, style: str, size: int) -> ColwiseParallel | RowwiseParallel:
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"tensor_parallel is {size}, but {name} is a {type(module).__name__}; expected a "
            "linear layer. Leave tensor_parallel out."
        )
    width = module.out_features if style == COLWISE else module.in_features
    if width % size:
        raise ValueError(
            f"tensor_parallel is {size}, which does not divide the {width} "
            f"{'outputs' if style == COLWISE else 'inputs'} of {name}."
        )
    return ColwiseParallel() if style == COLWISE else RowwiseParallel()


def _refuse_between(layer: nn.Module, plan: Mapping[str, str]) -> None:
    """What trains beside divided modules, though no plan names it: norms of heads (Phi),
    activations with weights (Apertus).
    """
    there = {name for name in plan if name in dict(layer.named_modules())}
    parents = {name.rpartition(".")[0] + "." for name in there}
    for name, parameter in layer.named_parameters():
        divided = any(name.startswith(known + ".") for known in there)
        beside = any(name.startswith(parent) for parent in parents)
        if parameter.requires_grad and beside and not divided:
            _refuse(name)


def _refuse_trained(name: str, module: nn.Module) -> None:
    if any(p.requires_grad for p in module.parameters()):
        _refuse(name)


def _refuse(name: str) -> None:
    raise ValueError(
        f"tensor_parallel: {name} trains, but each rank sees a part of the heads or outputs alone, "
        "and its gradient is not summed. Tune the LLM by LoRA, or leave tensor_parallel out."
    )
