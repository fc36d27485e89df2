"""The strategy that a recipe names, as it is configured: what it is called in the plan, what of a
recipe it refuses at its start, and what of it the plan does not know.
"""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch.strategies import DDPStrategy

from mmfusion.tools.plan.memory import COUNTED
from mmfusion.training.command import RecipeCommand
from mmfusion.training.module import MultimodalModule
from mmfusion.training.strategies.fsdp2 import FSDP2
from mmfusion.training.strategies.names import OURS
from mmfusion.training.strategies.shares import frozen_parts, refuse_numbers, refuse_quantised
from mmfusion.training.strategies.tensor import divided_weights
from mmfusion.training.strategies.zero import ZeRO, left_out, refuse_precision

DDP = "ddp"
DIVIDES = ("divide_encoders", "divide_denoisers")
"""Options of both of ours."""


def chosen(command: RecipeCommand) -> Any:
    """Ours, made; Lightning's as it is given, made or by its name; None where it is Lightning's to
    choose.
    """
    given = command.config.get("strategy") or command.config_init.trainer.get("strategy")
    if isinstance(given, str) and given in OURS:
        return made(given)
    return None if given == "auto" else given


def made(name: str) -> ZeRO | FSDP2:
    """Ours, by its word."""
    kind, options = OURS[name]
    return cast(ZeRO | FSDP2, kind(**options))


def title(strategy: Any) -> str:
    """Its word, with the options that differ from those of the word."""
    if isinstance(strategy, ZeRO):
        options = [name for name in DIVIDES if getattr(strategy, name)]
        options += ["nvme"] if strategy.offload == "nvme" else []
        options += ["config"] if _own_fields(strategy) else []
        name = f"deepspeed_{strategy.stage}" + ("_offload" if strategy.offload else "")
    elif isinstance(strategy, FSDP2):
        options = [name for name in ("offload", *DIVIDES) if getattr(strategy, name)]
        options += [] if strategy.reshard else ["reshard: false"]
        size = strategy.tensor_parallel
        options += [f"tensor_parallel: {size}"] if size > 1 else []
        name = "fsdp2"
    elif is_ddp(strategy):
        return DDP
    else:
        return strategy if isinstance(strategy, str) else type(strategy).__name__
    return f"{name} ({', '.join(options)})" if options else name


def is_ddp(strategy: Any) -> bool:
    """Whether it is one of Lightning's kinds of DDP."""
    named = isinstance(strategy, str) and strategy.startswith(DDP)
    return named or (isinstance(strategy, DDPStrategy) and not isinstance(strategy, ZeRO))


def zero_fields(strategy: ZeRO) -> dict[str, Any]:
    """Its ``zero_optimization``."""
    return cast(dict[str, Any], cast(dict[str, Any], strategy.config)["zero_optimization"])


def _own_fields(strategy: ZeRO) -> list[str]:
    """Fields of ``zero_optimization`` that the recipe's ``config`` gives another value."""
    options = {"stage": strategy.stage, "offload": strategy.offload}
    nvme = {"nvme_path": "-"} if strategy.offload == "nvme" else {}
    plain = zero_fields(ZeRO(**cast(Any, options | nvme)))
    own = zero_fields(strategy)
    if nvme:
        own, plain = ({k: v for k, v in f.items() if "offload" not in k} for f in (own, plain))
    return sorted(name for name, value in own.items() if plain.get(name) != value)


def why_refused(strategy: Any, module: MultimodalModule, precision: str) -> str:
    """What the strategy will say at its start; nothing where it takes the recipe.

    Args:
        strategy: as :func:`chosen` gives it.
        module: built, its tuning applied.
        precision: ``trainer.precision``.
    """
    try:
        if isinstance(strategy, ZeRO):
            refuse_precision(precision)
            if strategy.stage == 3:
                refuse_quantised(module, "ZeRO stage 3")
            with left_out(frozen_parts(module)):
                refuse_numbers(module)
        elif isinstance(strategy, FSDP2):
            refuse_quantised(module, "FSDP2")
            refuse_numbers(module)
            if strategy.tensor_parallel > 1:
                divided_weights(module.model.llm, strategy.tensor_parallel)
    except ValueError as error:
        return str(error)
    return ""


def unknown(strategy: Any) -> list[str]:
    """What of its memory the plan cannot tell, a line each."""
    found = []
    if isinstance(strategy, FSDP2) and strategy.tensor_parallel > 1:
        found.append(
            "tensor_parallel: weights, gradients and the optimizer's state are counted as a rank "
            "of a group has them; activations within a layer are counted whole, of which it keeps "
            "a part."
        )
    if isinstance(strategy, ZeRO):
        if strategy.offload == "nvme":
            found.append(
                "offload: nvme: host is what lies on the disks; DeepSpeed's buffers in the host's "
                "memory are not counted."
            )
        if odd := [name for name in _own_fields(strategy) if name not in COUNTED]:
            found.append(
                f"config.zero_optimization: what {', '.join(odd)} of the recipe changes is not "
                "counted."
            )
    return found
