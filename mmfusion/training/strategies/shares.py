"""What of a model is divided among ranks that share it, and what of it every rank holds whole.

What is divided is gathered where it is used: a collective that every rank has to reach as often, in
the same order. Whatever runs more often on one rank than on another stays whole therefore.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from mmfusion.data.datamodule import data_of
from mmfusion.models.generators.base import DENOISER
from mmfusion.training.callbacks.validation import Validation
from mmfusion.training.checkpoint import read_checkpoint
from mmfusion.training.module import MultimodalModule
from mmfusion.training.sharded import renamed
from mmfusion.tuning import is_half

ASKED = ("generate_samples", "table_samples", "media_samples")
"""Of a validation: for how many samples it asks the model."""
OF_MATRICES = (
    *("adafactor", "adam_mini", "asgd", "came", "dadaptadam", "distributedshampoo", "fusedlamb"),
    *("lamb", "lars", "lbfgs", "muon", "novograd", "prodigy", "shampoo", "soap", "sparseadam"),
)
"""Optimizers, of PyTorch and others, whose update of a number depends on its neighbours, on all
numbers, or on a number that groups do not share; in small letters.
"""


def frozen_parts(module: MultimodalModule) -> list[tuple[nn.Module, str]]:
    """The largest frozen modules that stay whole, each as its owner and its name there: neither in
    the LLM nor in a part that is divided.
    """
    found: list[tuple[nn.Module, str]] = []
    open_: list[nn.Module] = [module]
    left = {module.model.llm, *divided_parts(module)}
    while open_:
        owner = open_.pop()
        for name, child in owner.named_children():
            if child in left:
                continue
            trains = any(p.requires_grad for p in child.parameters())
            if trains or left & set(child.modules()):
                open_.append(child)
            elif any(True for _ in child.parameters()):
                found.append((owner, name))
    return found


def divided_parts(module: MultimodalModule) -> list[nn.Module]:
    """Those whose frozen weights ranks share as they share the LLM's."""
    return [module.model.get_submodule(name) for name in sorted(module.model.divided)]


def divide(module: MultimodalModule, encoders: bool, denoisers: bool) -> None:
    """Have every rank run every encoder, or the denoiser of every generator, and so share its
    weights. What is not built is not among them.
    """
    model = module.model
    found = [f"encoders.{name}" for name in model.encoders if encoders]
    found += [f"generators.{name}.{DENOISER}" for name in model.generators if denoisers]
    built = {name for name, _ in model.named_modules()}
    model.divided = set(found) & built


def repeated(part: nn.Module) -> list[nn.Module]:
    """The modules of a part that are repeated: what is gathered at a time. Of lists within lists
    the outer ones: a U-Net's blocks.
    """
    found: list[nn.Module] = []
    for child in part.children():
        found += child if isinstance(child, nn.ModuleList) else repeated(child)
    return found


def ask_nothing(trainer: L.Trainer, strategy: str) -> None:
    """Validations ask the model nothing, and say so: ranks would run the LLM as often as their
    answers are long, and wait for one another.
    """
    for callback in cast(Any, trainer).callbacks:
        if not (isinstance(callback, Validation) and data_of(trainer).val_sources):
            continue
        asked = {name: value for name in ASKED if (value := getattr(callback.asking, name))}
        if asked:
            callback.asking = replace(callback.asking, **cast(Any, dict.fromkeys(asked, 0)))
            rank_zero_warn(
                f"under {strategy} the LLM cannot generate so far: validations leave out {asked}. "
                "mmfusion validate --strategy=ddp asks a checkpoint; strategy: deepspeed_2 or ddp "
                "lets a run be asked while it trains."
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


def refuse_optimizer(optimizer: Any, strategy: str) -> None:
    """What is divided is stepped in pieces, which is the same only where each number is by itself.

    Raises:
        ValueError: for optimizers that look at more.
    """
    kinds = [kind.__name__ for kind in type(optimizer).__mro__]
    if whole := [kind for kind in kinds if kind.lower() in OF_MATRICES]:
        raise ValueError(
            f"model.optimizer is {whole[0]}, which computes with whole matrices, but {strategy} "
            "divides what it steps: it would train otherwise than one process does. Use AdamW or "
            "another optimizer that treats each number by itself, or strategy: ddp."
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
    _unread: Mapping[str, Tensor] = {}
    """Weights of a checkpoint, by name."""

    @property
    def widens_llm(self) -> bool:
        """Whether the LLM is loaded, and where it trains whole made float32, as it is divided
        (:meth:`widen`).
        """
        return False

    def loaded_later(self, module: MultimodalModule) -> set[str]:
        """Names of the weights that :meth:`widen` loads: the LLM's layers, and what trains in half
        precision.
        """
        if not self.widens_llm:
            return set()
        layers = {p for layer in module.model.llm.layers for p in layer.parameters()}
        return {n for n, p in module.named_parameters() if p in layers or is_half(p)}

    def load_later(self, state: Mapping[str, Tensor]) -> None:
        """What of them a checkpoint has, by name."""
        self._unread = state

    def widen(self, parameters: Iterable[nn.Parameter], names: Mapping[nn.Parameter, str]) -> None:
        """Give those their values that a checkpoint has, and make those float32 that train in half
        precision. Called for what is divided next, so that no rank has all of them at once.

        Args:
            parameters: not divided yet.
            names: in the module.
        """
        for parameter in parameters:
            if names[parameter] in self._unread or is_half(parameter):
                self.own(parameter, names, parameter.device)

    def own(
        self, parameter: nn.Parameter, names: Mapping[nn.Parameter, str], device: torch.device
    ) -> None:
        """Copy one into memory of its own, as :meth:`widen` does, whatever it is."""
        value = self._unread.get(names[parameter], parameter.data)
        assert value.shape == parameter.shape, names[parameter]
        dtype = torch.float32 if is_half(parameter) else parameter.dtype
        parameter.data = value.to(device, dtype, copy=True)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Not in the form of Lightning's strategy."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Tensors stay in their files until each rank takes its share."""
        return read_checkpoint(checkpoint_path, unread=True)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """One weight after the other: where they are in shards, no two of them are read at once.
        What is divided with the LLM's layers still waits for :meth:`widen`.
        """
        module = cast(MultimodalModule, self.lightning_module)
        own, state = module.state_dict(keep_vars=True), checkpoint["state_dict"]
        later = self.loaded_later(module) & set(state)
        for name in state:
            if name not in later:
                own[name].copy_(state[name])
        self.load_later(renamed(state, {name: name for name in later}))
