"""What the weights of adapters, new tokens and projectors mean besides their shapes: written into a
checkpoint, compared where a later stage or a resume takes them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import nn

from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.tuning import TuningError, parameters_with


def take_rows(model: nn.Module, loaded: Collection[str]) -> set[str]:
    """Call when an earlier stage was loaded: where it trained whole tables and here PEFT has the
    rows of new tokens, these are the tables' rows.

    Args:
        model: after :func:`apply`.
        loaded: names of what was loaded.

    Returns:
        Names of the rows that were taken.
    """
    taken = set()
    for prefix, layer in model.named_modules():
        if not isinstance(layer, TrainableTokensLayer):
            continue
        table = layer.get_base_layer().weight
        rows = parameters_with("trainable_tokens_delta", layer)
        names = {f"{prefix}.{name}" for name in rows}
        if f"{prefix}.base_layer.weight" not in loaded or names & set(loaded):
            continue
        for adapter, parameter in layer.trainable_tokens_delta.items():
            parameter.data.copy_(table.data[layer.token_indices[adapter]])
        taken |= names
    return taken


def meaning(model: AnyToAnyModel) -> dict[str, Any]:
    """What trained weights mean besides their shapes: the scale of every adapter, which tokens the
    rows are of, and the arguments of projectors that say what is computed with theirs.
    """
    scales = {
        name: float(scale)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for scale in module.scaling.values()
    }
    projectors: dict[str, dict[str, Any]] = {}
    for kind in ("input_projectors", "output_projectors"):
        for modality, projector in getattr(model, kind).items():
            values = {name: getattr(projector, name) for name in projector.means}
            plain = {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
            projectors[f"{kind}.{modality}"] = plain
    return {
        "scale": scales,
        "new_tokens": list(getattr(model.llm, "new_tokens", [])),
        "projectors": projectors,
    }


def check_meaning(
    model: AnyToAnyModel, earlier: Mapping[str, Any], dropped: Collection[str]
) -> None:
    """Refuse adapters of another scale, rows of other tokens and projectors of other arguments.

    Args:
        model: after :func:`apply`.
        earlier: :func:`meaning` of the model whose weights are taken.
        dropped: parts whose weights are not.
    """
    here = meaning(model)
    scales = {
        name: scale
        for name, scale in dict(earlier.get("scale", {})).items()
        if not any(name.startswith(f"{part}.") for part in dropped)
    }
    other = [name for name, scale in scales.items() if scale != here["scale"].get(name, scale)]
    if other:
        raise TuningError(
            f"{len(other)} adapters were trained with another scale: {other[0]} with "
            f"{scales[other[0]]:g}, here it has {here['scale'][other[0]]:g}. Give LoRA the alpha, "
            "r and use_rslora of that run."
        )
    tokens = list(earlier.get("new_tokens", []))
    if tokens and "llm" not in dropped and tokens != here["new_tokens"]:
        raise TuningError(
            f"the loaded rows of new tokens are of {tokens}, here new_tokens is "
            f"{here['new_tokens']}; name the same tokens in the same order."
        )
    for name, given in dict(earlier.get("projectors", {})).items():
        if name in dropped or name.partition(".")[0] in dropped:
            continue
        now = here["projectors"].get(name, {})
        if odd := [key for key in given if key in now and given[key] != now[key]]:
            raise TuningError(
                f"{name} was trained with {odd[0]} {given[odd[0]]!r}, here it has "
                f"{now[odd[0]]!r}: its weights would compute something else. Give it the "
                f"{odd[0]} of that run, or leave its weights behind (init_drop: [{name}])."
            )
