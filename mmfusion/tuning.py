"""What trains, and with which learning rate: ``tuning: {part: policy}``. What is not named is
frozen.

A part is a submodule path of :class:`AnyToAnyModel`: ``llm``, ``input_projectors``,
``encoders.image``. :func:`apply` puts the policies on a built model and gives the optimizer's
parameter groups.
"""

from __future__ import annotations

import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from peft import LoraConfig, TrainableTokensConfig, inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mmfusion.models import quantised
from mmfusion.models.any_to_any import AnyToAnyModel

Named = dict[str, nn.Parameter]
Needs = dict[str, set[str]]


class ParamGroup(TypedDict):
    """One optimizer group: of a part, under a policy, with or without weight decay."""

    params: list[nn.Parameter]
    name: str
    part: str
    lr: float
    weight_decay: float


class TuningError(ValueError):
    """A recipe whose tuning cannot be meant."""


class Policy(ABC):
    """How one part trains.

    Args:
        lr: peak learning rate.
        weight_decay: of weights; norms, biases and other vectors have none.
    """

    def __init__(self, lr: float, weight_decay: float = 0.0) -> None:
        for name, value in {"lr": lr, "weight_decay": weight_decay}.items():
            if not 0 <= value < math.inf:
                raise TuningError(
                    f"{type(self).__name__}: {name} is {value}; expected 0 or more, finite."
                )
        self.lr = lr
        self.weight_decay = weight_decay

    @abstractmethod
    def attach(self, name: str, part: nn.Module) -> Named:
        """Add what the policy needs to the part, and give the parameters that train, by their name
        in the part, in the part's precision (:func:`widen`).

        Raises:
            TuningError: where the policy finds nothing to act on.
        """


class Frozen(Policy):
    """Nothing trains (as if the part were not named)."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)

    def attach(self, name: str, part: nn.Module) -> Named:
        return {}


class Full(Policy):
    """Every parameter of the part trains, in fp32: where the part is bf16, small updates would be
    lost.

    Args:
        lr: peak learning rate.
        weight_decay: of weights; norms, biases and other vectors have none.
    """

    def __init__(self, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(lr, weight_decay)

    def attach(self, name: str, part: nn.Module) -> Named:
        parameters = dict(part.named_parameters())
        if not parameters:
            raise TuningError(f"tuning.{name}: the part has no parameters to train.")
        if packed := quantised.layers(part):
            kind = quantised.precision(next(iter(packed.values())).weight)
            raise TuningError(
                f"tuning.{name}: Full cannot train {len(packed)} layers whose weights are kept in "
                f"{kind} ({', '.join([*packed][:2])}, ...). Train LoRA beside them, or take "
                "quantization out of the part."
            )
        return parameters


class LoRA(Policy):
    """Low-rank adapters beside linear layers (arXiv:2106.09685), by PEFT. In fp32 also where the
    part is bf16.

    Args:
        lr: peak learning rate.
        r: rank.
        alpha: scale; the update is multiplied by alpha / r (None: 2 r).
        dropout: on the adapters' input.
        targets: ``all-linear`` (all but the output head), names' ends (``[q_proj, v_proj]``), or a
            regular expression for the whole module name inside the part.
        use_rslora: scale by alpha / sqrt(r) (arXiv:2312.03732).
        weight_decay: of the adapters.
        train: False keeps the adapters, loaded by ``init_from``, but frozen.
    """

    def __init__(
        self,
        lr: float,
        r: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        targets: str | list[str] = "all-linear",
        use_rslora: bool = False,
        weight_decay: float = 0.0,
        train: bool = True,
    ) -> None:
        super().__init__(lr, weight_decay)
        self.r = r
        self.alpha = 2 * r if alpha is None else alpha
        self.dropout = dropout
        self.targets = targets
        self.use_rslora = use_rslora
        self.train = train

    def attach(self, name: str, part: nn.Module) -> Named:
        if not parameters_with("lora_", part):
            config = LoraConfig(
                r=self.r,
                lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT takes floats too
                lora_dropout=self.dropout,
                target_modules=self._matched(name, part),
                use_rslora=self.use_rslora,
            )
            _mark_quantised(part)
            inject_adapter_in_model(config, part)
        adapters = parameters_with("lora_", part)
        return adapters if self.train else {}

    def _matched(self, name: str, part: nn.Module) -> list[str]:
        """Names of the targeted linear layers in the part."""
        layers = _linear_layers(part)
        if self.targets == "all-linear":
            heads = [m.get_output_embeddings() for m in pretrained_models(part)]
            skip = {module for head in heads if head is not None for module in head.modules()}
            found = [key for key, module in layers.items() if module not in skip]
            missed = [] if found else ["all-linear"]
        elif isinstance(self.targets, str):
            found = [key for key in layers if re.fullmatch(self.targets, key)]
            missed = [] if found else [self.targets]
        else:
            ends = {t: [k for k in layers if k == t or k.endswith("." + t)] for t in self.targets}
            missed = [target for target, keys in ends.items() if not keys]
            found = sorted({key for keys in ends.values() for key in keys})
        if missed or not found:
            known = sorted({key.rsplit(".", 1)[-1] for key in layers})
            raise TuningError(
                f"tuning.{name}: LoRA targets {missed or self.targets} match no linear layer; its "
                f"layers are named {known}."
            )
        return found


class NewTokens(Policy):
    """Only the rows of the LLM's ``new_tokens`` train, in the embeddings and in the output head, by
    PEFT; every other row stays bit for bit.

    Args:
        lr: peak learning rate.
        weight_decay: of the new rows.
        train: False keeps the rows, loaded by ``init_from``, but frozen.
    """

    def __init__(self, lr: float, weight_decay: float = 0.0, train: bool = True) -> None:
        super().__init__(lr, weight_decay)
        self.train = train

    def attach(self, name: str, part: nn.Module) -> Named:
        if not (ids := new_token_ids(part)):
            raise TuningError(
                f"tuning.{name}: NewTokens finds no new tokens there; list them in the LLM's "
                "new_tokens, and put the policy on the LLM."
            )
        if not parameters_with("trainable_tokens_delta", part):
            model = pretrained_models(part)[0]
            tables = [model.get_input_embeddings()]
            if not model.config.get_text_config().tie_word_embeddings:
                tables.append(model.get_output_embeddings())
            names = [key for key, m in model.named_modules() if any(m is t for t in tables)]
            if odd := [type(t).__name__ for t in tables if parameters_with("lora_", t)]:
                raise TuningError(
                    f"tuning.{name}: LoRA and NewTokens both act on {names} ({odd}), which PEFT "
                    "cannot combine; leave embeddings and output head out of LoRA's targets."
                )
            config = TrainableTokensConfig(token_indices=ids, target_modules=names)
            inject_adapter_in_model(config, model)
        rows = parameters_with("trainable_tokens_delta", part)
        return rows if self.train else {}


def apply(
    model: AnyToAnyModel,
    tuning: Mapping[str, Policy | Sequence[Policy]],
    widen_llm: bool = True,
) -> list[ParamGroup]:
    """Freeze a built model but for what the policies train, which is made float32.

    Args:
        model: built; adapters are added to it in place.
        tuning: for each part, its policy or policies.
        widen_llm: False leaves an LLM that trains whole as it is: whoever divides it makes it
            float32, a layer at a time.

    Returns:
        The optimizer's groups, in the order of ``tuning``.

    Raises:
        TuningError: for a key that names no part, a policy that matches nothing, or a parameter
            that two policies claim.
    """
    claimed: list[tuple[str, Policy, Named]] = []
    for name, policies in tuning.items():
        if _is_stored(model, name):  # nothing is there to freeze, and what trains is never stored
            continue
        part = _part(model, name)
        for policy in [policies] if isinstance(policies, Policy) else policies:
            claimed.append((name, policy, policy.attach(name, part)))
    model.requires_grad_(False)
    owners: dict[nn.Parameter, str] = {}
    groups: list[ParamGroup] = []
    for name, policy, parameters in claimed:
        label = f"{name}/{type(policy).__name__}"
        for key, parameter in parameters.items():
            if parameter in owners:
                raise TuningError(
                    f"{name}.{key} is claimed by {owners[parameter]} and by {label}; name each "
                    "part once, and no part inside another."
                )
            owners[parameter] = label
            parameter.requires_grad_(True)
            later = isinstance(policy, Full) and name == "llm" and not widen_llm
            if not later:
                widen([parameter])
        groups += _groups(label, name, policy, list(parameters.values()))
    model.train(model.training)  # frozen encoders go back to evaluation mode
    return groups


def named_parts(tuning: Mapping[str, Policy | Sequence[Policy]], model: AnyToAnyModel) -> Needs:
    """The parts of each generator that policies name: they are built, whether or not an objective
    runs them, so that what an earlier stage trained there has its place. A policy on a whole
    generator names all of it, unless it is ``Frozen``.

    Args:
        tuning: for each part, its policy or policies.
        model: not built.
    """
    found: Needs = {modality: set() for modality in model.generators}
    for name, policies in tuning.items():
        listed = [policies] if isinstance(policies, Policy) else policies
        idle = all(isinstance(policy, Frozen) for policy in listed)
        for modality, parts in found.items():
            own = model.generator(modality).modules_by_name()
            whole = f"generators.{modality}"
            if name in ("generators", whole):
                parts |= set() if idle else set(own.values())
            elif name.startswith(f"{whole}."):
                part = own.get(name.removeprefix(f"{whole}.").split(".")[0])
                parts |= {part} if part else set()
    return found


def _groups(
    label: str, part: str, policy: Policy, parameters: list[nn.Parameter]
) -> list[ParamGroup]:
    """With and without weight decay; one group where there is none to apply."""
    vectors = [p for p in parameters if p.ndim < 2] if policy.weight_decay else []
    weights = [p for p in parameters if p.ndim >= 2] if policy.weight_decay else parameters
    groups = (
        ParamGroup(
            params=weights, name=label, part=part, lr=policy.lr, weight_decay=policy.weight_decay
        ),
        ParamGroup(
            params=vectors, name=f"{label}/no_decay", part=part, lr=policy.lr, weight_decay=0.0
        ),
    )
    return [group for group in groups if group["params"]]


def _is_stored(model: AnyToAnyModel, name: str) -> bool:
    """Whether it names what is not built because its work comes with the targets."""
    return any(
        f"{name}.".startswith(f"generators.{modality}.{own}.")
        for modality, parts in model.stored.items()
        for own, part in model.generator(modality).modules_by_name().items()
        if part in parts
    )


def _part(model: AnyToAnyModel, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        parts = [key for key, _ in model.named_modules() if key and key.count(".") < 2]
        for modality in model.generators:
            own = model.generator(modality).modules_by_name()
            parts += [f"generators.{modality}.{key}" for key in own]
        inside, _, _ = name.rpartition(".")
        if inside in parts:  # then it is the end of the name that is wrong
            near = difflib.get_close_matches(
                name.removeprefix(f"{inside}."),
                [key.removeprefix(f"{inside}.") for key in parts if key.startswith(f"{inside}.")],
                n=1,
            )
            near = [f"{inside}.{end}" for end in near]
        else:
            near = difflib.get_close_matches(name, parts, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        main = [key for key in parts if not key.startswith("llm.")]
        raise TuningError(f"tuning.{name} names no part of the model {main}{hint}") from None


def pretrained_models(part: nn.Module) -> list[PreTrainedModel]:
    """Outermost transformers models in the part."""
    models = [module for module in part.modules() if isinstance(module, PreTrainedModel)]
    return models[:1]


def _linear_layers(part: nn.Module) -> dict[str, nn.Module]:
    kinds: Any = (nn.Linear, Conv1D)
    return {name: module for name, module in part.named_modules() if isinstance(module, kinds)}


def _mark_quantised(part: nn.Module) -> None:
    """PEFT asks the part it is given, not its layers, and would take these for plain ones."""
    for layer in quantised.layers(part).values():
        setattr(part, f"is_loaded_in_{quantised.bits(layer.weight)}bit", True)


def new_token_ids(part: nn.Module) -> list[int]:
    """Of the tokens that the recipe adds to the LLM."""
    return list(part.new_token_ids) if getattr(part, "new_tokens", None) else []  # type: ignore[arg-type]


def parameters_with(text: str, part: nn.Module) -> Named:
    """Parameters of the part with ``text`` in their names."""
    return {name: p for name, p in part.named_parameters() if text in name}


def widen(parameters: Iterable[nn.Parameter]) -> None:
    """Make those float32 that train in half precision."""
    for parameter in filter(is_half, parameters):
        parameter.data = parameter.data.float()


def is_half(parameter: nn.Parameter) -> bool:
    """Whether it trains in half precision, where small updates are lost."""
    return parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16)
