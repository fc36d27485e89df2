"""Follows what a pass of tensors without values would allocate and compute.

Numbers with a fraction are fake tensors (torch's ``FakeTensorMode``): shape, dtype and device, no
memory. Whole numbers and truth values stay real: sizes, borders and masks are read from them in the
middle of a forward pass. A storage counts from the operation that makes it to the moment nothing
holds it any more, so what autograd keeps for the backward pass is exactly what is counted. Left out
is what kernels take for themselves while they run.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
SMALL = 4096
"""Elements up to which fractions made of nothing stay real: levels of noise, an optimizer's count
of its steps."""
ELSEWHERE, FORWARD, BACKWARD, RECOMPUTE, STEP = (
    "elsewhere", "forward", "backward", "recompute", "optimizer step",
)  # fmt: skip
_INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
_ATTENTION_ON_CPU: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    ),
}
"""Not in torch's registry."""


class Trace(TorchDispatchMode):
    """Counts bytes that are alive, and floating point operations, by the part that runs.

    Args:
        fakes: the mode that its fake tensors belong to; entered before this one.
        known: tensors that are there before (weights), which are not counted.

    Attributes:
        live: bytes of storages made in the pass that something holds now.
        live_by_part: of them, by the part that made them.
        gradients: bytes that are gradients by now; whoever sees them tells.
        casts: bytes of copies of weights in half precision, by autocast, since :meth:`restart`.
        peak: largest :attr:`live` since :meth:`restart`.
        besides: largest :attr:`live` without :attr:`gradients` since then.
        by_part: :attr:`live_by_part` at that moment.
        flops: by (phase, part).
        phase: what operations are counted under, and what is made outside of modules; set from
            outside.
        entered: part that was entered last.
    """

    def __init__(self, fakes: FakeTensorMode, known: list[Tensor]) -> None:
        super().__init__()
        self._fakes = fakes
        self._storages: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = weakref.ref(storage)
        self._kept = [tensor.untyped_storage() for tensor in known]
        self._weights = set(self._storages)
        self.casts = 0
        self.live = self.peak = self.besides = self.gradients = 0
        self.live_by_part: Counter[str] = Counter()
        self.by_part: Counter[str] = Counter()
        self.flops: Counter[tuple[str, str]] = Counter()
        self.phase = ""
        self.entered = ELSEWHERE
        self.part: list[str] = []

    def restart(self) -> None:
        """Look for the peaks from now on."""
        self.peak = self.besides = self.casts = 0
        self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, self.live)
        if (besides := self.live - self.gradients) > self.besides:
            self.besides, self.by_part = besides, self.live_by_part.copy()
            self.by_part[BACKWARD] -= self.gradients

    @contextmanager
    def parts(self, names: dict[nn.Module, str]) -> Iterator[None]:
        """Charge what modules do to the parts they belong to."""

        def enter(module: nn.Module, args: Any) -> None:
            self.part.append(names.get(module, self.part[-1] if self.part else ELSEWHERE))
            self.entered = self.part[-1]

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.part.pop()

        own = nn.modules.module
        hooks = [
            own.register_module_forward_pre_hook(enter),
            own.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for more often than anything is computed
        if func.namespace == "prim":
            return func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) for x in given):
            if not all(isinstance(x, FakeTensor) for x in given):
                args, kwargs = self._faked(func, args, kwargs)
            kwargs.pop("generator", None)
            output = func(*args, **kwargs)
        elif given or _stays_real(args, kwargs, func):
            with unset_fake_temporarily():
                output = func(*args, **kwargs)
        else:
            kwargs.pop("generator", None)
            output = func(*args, **kwargs)
        self._count(func, args, kwargs, output)
        if func is aten._to_copy.default and self._is_weight(args[0]):
            halved = output.element_size() == 2 < args[0].element_size()
            self.casts += output.untyped_storage().nbytes() if halved else 0
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        return output

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._weights

    def _faked(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func._overloadpacket in _INDEXED:
            args = (args[0], _places(args[1]), *args[2:])
        return tree_map_only(Tensor, self._fake, (args, kwargs))

    def _fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.is_meta:  # made with the model, kept by a module in an attribute
            with self._fakes:
                return torch.empty(tensor.shape, dtype=tensor.dtype)
        return self._fakes.from_tensor(tensor)

    def _count(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        packet = func._overloadpacket
        found = 0
        if packet in _ATTENTION_ON_CPU:
            found = _ATTENTION_ON_CPU[packet](*args)
        elif packet in flop_registry:
            found = flop_registry[packet](*args, **kwargs, out_val=output)
        if found:
            # A module's forward pass inside the backward pass: gradient checkpointing.
            again = self.phase == BACKWARD and bool(self.part)
            phase = RECOMPUTE if again else self.phase
            self.flops[phase, self.part[-1] if self.part else ELSEWHERE] += found

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (known := self._storages.get(key)) is not None and known() is not None:
            return
        size, part = storage.nbytes(), self.part[-1] if self.part else self.phase or ELSEWHERE

        def gone(_: Any) -> None:
            self._storages.pop(key, None)
            self.live -= size
            self.live_by_part[part] -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size
        self.live_by_part[part] += size
        self._look()


def _stays_real(args: Any, kwargs: dict[str, Any], func: Any) -> bool:
    """Whether what is made of no tensor is whole numbers, or few."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        whole = not dtype.is_floating_point
    elif func._overloadpacket in (aten.randint, aten.randperm):
        whole = True
    elif func._overloadpacket in (aten.arange, aten.full, aten.scalar_tensor):
        whole = not any(isinstance(x, float) for x in tree_leaves((args, kwargs)))
    else:
        whole = False
    sizes = args[0] if args and isinstance(args[0], list | tuple) else ()
    count = 1
    for size in sizes:
        count *= int(size)
    return whole or (bool(sizes) and count <= SMALL) or func._overloadpacket is aten.scalar_tensor


def _places(indices: Any) -> list[Any]:
    """Masks as the places where they are true: how many, only their values tell."""
    found: list[Any] = []
    for index in indices:
        real = isinstance(index, Tensor) and not isinstance(index, FakeTensor)
        if real and index.dtype in (torch.bool, torch.uint8):
            with unset_fake_temporarily():
                found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found
