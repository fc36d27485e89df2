"""Which recipes cannot be meant: nothing trains, new tokens or random parts neither train nor were
loaded, a parameter that trains reaches no loss.

:func:`audit` gives the table of what trains, shown before step 1; :func:`check_reaches_loss` is
asked after the first backward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from mmfusion.models import quantised
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.tuning import (
    Named,
    ParamGroup,
    TuningError,
    new_token_ids,
    parameters_with,
    pretrained_models,
)


@dataclass(frozen=True)
class AuditRow:
    """One part of the model."""

    part: str
    kind: str
    parameters: int
    trainable: int
    dtype: str
    lr: str


@dataclass(frozen=True)
class AuditTable:
    """What trains, part by part; ``str`` draws it, ``rows`` go to the logger."""

    rows: list[AuditRow]

    def __str__(self) -> str:
        head = ("part", "class", "parameters", "trainable", "dtype", "lr")
        lines = [head, *((r.part, r.kind, f"{r.parameters:,}", f"{r.trainable:,}", r.dtype, r.lr)
                 for r in self.rows)]  # fmt: skip
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if index in (2, 3) else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def audit(
    model: AnyToAnyModel, groups: Sequence[ParamGroup], loaded: Collection[str] = ()
) -> AuditTable:
    """The table of what trains.

    Args:
        model: after :func:`apply`.
        groups: what :func:`apply` gave.
        loaded: names of the parameters that came from ``init_from``.

    Raises:
        TuningError: where nothing trains, what trains is not what the optimizer holds, or new
            tokens, an input projector or adapters neither train nor were loaded.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = {parameter for group in groups for parameter in group["params"]}
    trains = {parameter for parameter in names if parameter.requires_grad}
    if not trains:
        raise TuningError(
            "nothing trains: every part is frozen. Name a part in tuning, for example "
            "input_projectors: {class_path: mmfusion.tuning.Full, init_args: {lr: 1.0e-3}}."
        )
    if held != trains:
        odd = sorted(names.get(p, "a parameter that left the model") for p in held ^ trains)
        raise TuningError(
            f"{len(odd)} parameters train without being in the optimizer, or the reverse: "
            f"{odd[:5]}; nothing may change requires_grad after tuning.apply."
        )
    _check_new_tokens(model, loaded)
    _check_not_random(model, loaded)
    return AuditTable([_row(name, part, groups) for name, part in model.parts()])


def check_reaches_loss(model: nn.Module, reached: Collection[nn.Parameter] = ()) -> None:
    """Call after the first backward pass: every trainable parameter must have a gradient.

    Args:
        model: whose parameters are looked at.
        reached: those that were seen to get one, though it may be gone by now (ZeRO).

    Raises:
        TuningError: with the names of those that have none.
    """
    seen = set(reached)
    lost = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is None and p not in seen
    ]
    if lost:
        raise TuningError(
            f"{len(lost)} trainable parameters reach no loss: {lost[:8]}"
            f"{' ...' if len(lost) > 8 else ''}. Freeze their part, or check that its output is "
            "used."
        )


def _row(name: str, part: nn.Module, groups: Sequence[ParamGroup]) -> AuditRow:
    parameters = list(part.parameters())
    own = set(parameters)
    rates = {f"{g['lr']:g}": None for g in groups if own & set(g["params"])}
    dtypes = {quantised.precision(p): None for p in parameters}
    return AuditRow(
        part=name,
        kind=type(part).__name__,
        parameters=sum(map(quantised.count, parameters)),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        dtype=", ".join(dtypes) or "-",
        lr=", ".join(rates) or "-",
    )


def _check_new_tokens(model: AnyToAnyModel, loaded: Collection[str]) -> None:
    """New tokens must train or come from ``init_from``; else they stay the mean row for good."""
    if not (ids := new_token_ids(model.llm)):
        return
    lost = [
        name
        for name, parameter in _token_tables(model).items()
        if not parameter.requires_grad and name not in loaded
    ]
    if lost:
        raise TuningError(
            f"the LLM has {len(ids)} new tokens, but their rows ({lost}) neither train nor were "
            "loaded from init_from; add mmfusion.tuning.NewTokens to tuning.llm, or drop "
            "new_tokens."
        )


def _token_tables(model: AnyToAnyModel) -> Named:
    """Where the rows of new tokens are, in embeddings and output head: PEFT's rows, else the whole
    table. By name in the model.
    """
    tables: dict[nn.Parameter, str] = {}
    pretrained = pretrained_models(model.llm)[0]
    owners = (pretrained.get_input_embeddings(), pretrained.get_output_embeddings())
    names = {parameter: name for name, parameter in model.named_parameters()}
    for owner in owners:
        rows = list(parameters_with("trainable_tokens_delta", owner).values())
        for parameter in rows or [owner.weight]:
            tables[parameter] = names[parameter]
    return {name: parameter for parameter, name in tables.items()}


def _check_not_random(model: AnyToAnyModel, loaded: Collection[str]) -> None:
    """Projectors and adapters start at random: they must train or come from ``init_from``."""
    noise = [
        name
        for name, parameter in model.named_parameters()
        if (name.startswith(("input_projectors.", "output_projectors.")) or ".lora_" in name)
        and not parameter.requires_grad
        and name not in loaded
    ]
    if noise:
        raise TuningError(
            f"{len(noise)} random parameters neither train nor were loaded from init_from: "
            f"{noise[:4]}. Name their part in tuning, or give the run that trained it as "
            "model.init_from."
        )
