"""What of a model is divided among ranks that share it, and what of it every rank holds whole.

What is divided is gathered where it is used: a collective that every rank has to reach as often, in
the same order. Whatever runs more often on one rank than on another stays whole therefore.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from mmfusion.data.datamodule import data_of
from mmfusion.training.callbacks.validation import Validation
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.module import MultimodalModule


def frozen_parts(module: MultimodalModule) -> list[tuple[nn.Module, str]]:
    """The largest frozen modules outside the LLM, each as its owner and its name there."""
    found: list[tuple[nn.Module, str]] = []
    open_: list[nn.Module] = [module]
    while open_:
        owner = open_.pop()
        for name, child in owner.named_children():
            if child is module.model.llm:
                continue
            if any(p.requires_grad for p in child.parameters()):
                open_.append(child)
            elif any(True for _ in child.parameters()):
                found.append((owner, name))
    return found


def refuse_answers(trainer: L.Trainer, strategy: str) -> None:
    """Ranks would run the LLM as often as their answers are long, and wait for one another.

    Raises:
        ValueError: where a validation asks the model.
    """
    asked = {
        name: value
        for callback in cast(Any, trainer).callbacks
        if isinstance(callback, Validation) and data_of(trainer).val_sources
        for name in ("generate_samples", "table_samples", "media_samples")
        if (value := getattr(callback.asking, name))
    }
    if asked:
        raise ValueError(
            f"validation has {asked}, but under {strategy} the LLM cannot generate so far. "
            "Set these to 0 (mmfusion validate on one process asks a checkpoint), or use "
            "strategy: deepspeed_2."
        )


def refuse_quantised(module: MultimodalModule, strategy: str) -> None:
    """Bytes that hold two weights have no place among floating-point ones, divided and gathered.

    Raises:
        ValueError: where the LLM's weights are quantised.
    """
    if kind := module.model.llm.quantization:
        raise ValueError(
            f"the LLM has quantization: {kind}, but {strategy} divides its weights, which cannot "
            "be done with quantised ones. Use strategy: deepspeed_2 (or ddp), where every rank "
            "holds them whole, or leave quantization out."
        )


def refuse_numbers(model: nn.Module) -> None:
    """What is divided by its first dimension needs one.

    Raises:
        ValueError: for parameters without a dimension.
    """
    if numbers := [name for name, p in model.named_parameters() if p.ndim == 0]:
        raise ValueError(
            f"{len(numbers)} parameters have no dimension ({numbers[0]}, ...); to be divided they "
            "need one or more. Make them of shape (1,), or use strategy: ddp."
        )


def refuse_half(module: MultimodalModule) -> None:
    """What trains is kept in fp32, as the optimizer needs it.

    Raises:
        ValueError: where it is not.
    """
    half = [
        name for name, p in module.named_parameters() if p.requires_grad and p.dtype != torch.float
    ]
    if half:
        raise ValueError(
            f"{len(half)} parameters that train are not in float32 ({half[0]}, ...). The policies "
            "of model.tuning keep what trains in float32: let one of them name the part."
        )


def on_one(value: Tensor, here: bool) -> Tensor:
    """A gathered tensor in the memory of the rank that writes it; empty on the others."""
    return value.detach().to("cpu", copy=True) if here else value.detach().new_empty(0)


class GatheredCheckpoints(Strategy):
    """Of a strategy that divides the model: the checkpoints are those of one process. Rank 0 writes
    them, and weights are loaded before they are divided.
    """

    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Not in the form of Lightning's strategy."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Of shards, tensors are read when they are asked for."""
        return read_checkpoint(checkpoint_path, unread=True)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """One weight after the other: where they are in shards, no two of them are read at once."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict(keep_vars=True)
        for name, weight in checkpoint["state_dict"].items():
            own[name].copy_(weight)
