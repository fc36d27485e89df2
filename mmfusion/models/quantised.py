"""Linear layers whose weights are kept in 4 or 8 bits and never train, by bitsandbytes: the LLM
under QLoRA (arXiv:2305.14314) and LLM.int8() (arXiv:2208.07339).

Which layers these are is transformers' choice: all linear ones but the output head. Here is what it
leaves open, where bitsandbytes goes astray without an error, and how such layers are told.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import is_bitsandbytes_available

M = TypeVar("M", bound=nn.Module)
Kind = Literal["nf4", "int8"]
PACKED = {"Params4bit": 2, "Int8Params": 1}
"""Weights in a byte, by bitsandbytes' class of the parameter; by name, for it may be missing."""


def require(kind: Kind) -> None:
    """Refuse a recipe early where what it needs is not installed.

    Raises:
        ValueError: without bitsandbytes.
    """
    if not is_bitsandbytes_available():
        raise ValueError(
            f"quantization: {kind} needs bitsandbytes, which is not installed (or too old); "
            'pip install "mmfusion[quantized]".'
        )


def options(kind: Kind, dtype: torch.dtype) -> dict[str, Any]:
    """Of ``from_pretrained``: quantise each weight as it is read.

    Args:
        kind: how.
        dtype: that products are computed in.
    """
    # Left to itself transformers takes a GPU wherever there is one, whatever the trainer is on.
    return {"quantization_config": _config(kind, dtype), "device_map": _here()}


def _config(kind: Kind, dtype: torch.dtype) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _here() -> dict[str, torch.device]:
    return {"": torch.get_default_device()}


def stored_kind(config: Any, kind: Kind | None, path: str) -> str | None:
    """How the weights of a checkpoint are quantised; None where they are not.

    Args:
        config: the checkpoint's transformers configuration.
        kind: what the recipe says.
        path: named in errors.

    Raises:
        ValueError: where the recipe says something else.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    found = given if isinstance(given, dict) else given.to_dict()
    method, four = str(found.get("quant_method", "an unknown method")), found.get("load_in_4bit")
    if method == "bitsandbytes":
        method = str(found.get("bnb_4bit_quant_type")) if four else "int8"
    if method == kind or (kind is None and method not in ("nf4", "fp4", "int8")):
        return method
    raise ValueError(
        f"the weights in {path} are quantised ({method}), and quantization is {kind}. "
        + (f"Set it to {method}." if method in ("nf4", "int8") else "Take weights that are not.")
    )


@torch.no_grad()
def quantise(model: Any, kind: Kind, dtype: torch.dtype) -> None:
    """Quantise a transformers model in place, which has its weights, or is on the meta device."""
    from bitsandbytes import functional

    # Else made with the first weights, which cannot be done on the meta device.
    with torch.device("cpu"):
        functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    before = dict(model.named_modules())
    quantizer = AutoHfQuantizer.from_config(_config(kind, dtype), pre_quantized=False)
    quantizer.preprocess_model(model, device_map=_here())
    for name, layer in layers(model).items():
        old, empty = before[name], cast(Any, layer.weight)
        weight = old.weight.data.T if isinstance(old, Conv1D) else old.weight.data
        settings = {key: value for key, value in vars(empty).items() if key != "SCB"}
        made = type(empty)(weight.contiguous(), requires_grad=False, **settings)
        # `to` has no values to quantise on the meta device; the shapes are right all the same.
        layer.weight = made._quantize("meta") if weight.is_meta else made.to(weight.device)
        layer.bias = old.bias
    quantizer.postprocess_model(model)


def settle(model: nn.Module, dtype: torch.dtype) -> None:
    """Call when a quantised model has its weights.

    Args:
        model: with layers of bitsandbytes.
        dtype: that products are computed in (int8 takes its input's).
    """
    # It says at every call that int8 products take their input as float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for layer in cast(dict[str, Any], layers(model)).values():
        if bits(layer.weight) == 4:
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            # On CPUs with AVX-512 BF16 an evaluation would lay the weights out anew, scales rounded
            # to bfloat16, for a kernel that has no gradient: training could not go on after it.
            layer.support_avx512bf16_for_cpu = False
        elif layer.weight.CB is not None:
            layer.init_8bit_state()  # else the first forward pass does, and `move` has two cases


def change_precision(model: nn.Module, wanted: Callable[[torch.dtype], torch.dtype]) -> None:
    """What products of quantised weights are computed in, from what it was."""
    for layer in cast(dict[str, Any], layers(model)).values():
        if bits(layer.weight) == 4:
            layer.compute_dtype = wanted(layer.compute_dtype)


def move(model: M, device: torch.device | str) -> M:
    """A model to a device, with what 8-bit layers keep beside their weights: those move it only
    where they are asked one by one.
    """
    model = model.to(device)
    for layer in layers(model).values():
        layer.to(device)
    return model


def layers(part: nn.Module) -> dict[str, nn.Linear]:
    """The quantised layers of a part, by name."""
    return {
        name: module
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear) and is_quantised(module.weight)
    }


def is_quantised(tensor: Any) -> bool:
    """Whether it is a weight of such a layer."""
    return type(tensor).__name__ in PACKED


def bits(parameter: Tensor) -> int:
    """Of one number."""
    return 8 * parameter.element_size() // PACKED.get(type(parameter).__name__, 1)


def count(parameter: Tensor) -> int:
    """Numbers in a parameter, also where two of them share a byte."""
    if not is_quantised(parameter):
        return parameter.numel()
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return math.prod(state.shape)
    return parameter.numel() * parameter.element_size() * PACKED[type(parameter).__name__]


def precision(parameter: Tensor) -> str:
    """As tables show it: ``float32``, ``nf4``."""
    if is_quantised(parameter):
        return str(getattr(parameter, "quant_type", "int8"))
    return str(parameter.dtype).removeprefix("torch.")
