"""Checkpoints under ZeRO: the same as without it. Weights and the optimizer's state are gathered
from the ranks' shares and go back there; or, where every rank writes its own, are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmfusion.training.checkpoint import trained_names
from mmfusion.training.module import MultimodalModule
from mmfusion.training.sharded import Part
from mmfusion.training.strategies.shares import GatheredCheckpoints, on_one


class ZeROCheckpoints(GatheredCheckpoints):
    """Of a strategy that trains by DeepSpeed's engine.

    Attributes:
        stage: of ZeRO.
        sharded: whether each rank gives what it has.
        deepspeed_engine: once it is set up.
    """

    stage: int
    sharded: bool
    deepspeed_engine: Any
    global_rank: int
    world_size: int

    @property
    def _module(self) -> MultimodalModule:
        return cast(MultimodalModule, self.lightning_module)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, gathered; every rank must call it."""
        import deepspeed

        state, kept = self._module.state_dict(keep_vars=True), {}
        for name in sorted((trained_names(self._module) | self._module.inherited) & set(state)):
            if self.sharded:
                kept[name] = self._held(state[name])
                continue
            away = [p for p in [state[name]] if p.numel() == 0]  # not those that are kept whole
            with deepspeed.zero.GatheredParameters(away):
                kept[name] = on_one(state[name], self.is_global_zero)
        return kept

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """As the optimizer by itself would give it, gathered; every rank must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_states()
        inner, groups = optimizer.optimizer, []
        state: dict[int, dict[str, Tensor | Part]] = {}
        one: dict[str, Tensor] = next(iter(inner.state.values()), {})
        for group, options in zip(self._module.groups, inner.param_groups, strict=True):
            first = len(state)
            for parameter in group["params"]:
                state[len(state)] = {
                    key: value.clone()
                    if value.ndim == 0  # the step, of all that a rank has
                    else self._held_state(parameter, key)
                    if self.sharded
                    else on_one(safe_get_full_optimizer_state(parameter, key), self.is_global_zero)
                    for key, value in one.items()
                }
            groups.append({**options, "params": [*range(first, len(state))]})
        return {"state": state, "param_groups": groups}

    def _held(self, weight: Any) -> Tensor | Part:
        """Of a weight, what this rank has."""
        if weight.numel() or not hasattr(weight, "ds_id"):
            return cast(Tensor, weight.detach())
        share = weight.ds_tensor
        return Part(tuple(weight.ds_shape), self.global_rank * share.numel(), share.detach())

    def _held_state(self, parameter: Any, key: str) -> Part:
        """Of the optimizer's state of a weight, what this rank has."""
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_optimizer_state

            share = safe_get_local_optimizer_state(parameter, key)
            return Part(tuple(parameter.ds_shape), self.global_rank * share.numel(), share)
        shape, mapping = tuple(parameter.shape), parameter._hp_mapping
        if mapping is None:
            return Part(shape, 0, parameter.new_empty(0, dtype=torch.float32))
        start = mapping.lp_fragment_address.start
        return Part(shape, start, mapping.get_optim_state_fragment(key))

    def _link_states(self) -> None:
        """To their parameters; stages 1 and 2 do so by themselves for the first group alone."""
        if self.stage < 3:
            optimizer = self.deepspeed_engine.optimizer
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its share; every rank must call it."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        saved = checkpoint["optimizer_states"][0]["state"]
        optimizer = self.deepspeed_engine.optimizer
        three = "fp32_partitioned_groups_flat"
        shares = three if self.stage == 3 else "single_partition_of_fp32_groups"
        for share in getattr(optimizer, shares):  # DeepSpeed makes these in the first step
            optimizer.state[share] = {
                key: torch.zeros_like(share) if value.ndim else value.clone()
                for key, value in saved.get(0, {}).items()
            }
        self._link_states()
        parameters = [p for group in self._module.groups for p in group["params"]]
        for place, parameter in enumerate(parameters):
            for key, value in saved.get(place, {}).items():  # nothing before the first step
                if value.ndim == 0:
                    continue
                if self.stage == 3:  # DeepSpeed's own division fails where the last share is padded
                    share = self._share(value, parameter)
                    safe_set_local_optimizer_state(parameter, share, key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def _share(self, value: Tensor, parameter: Any) -> Tensor:
        """This rank's part of what belongs to a parameter, padded as DeepSpeed pads it."""
        size = parameter.ds_tensor.numel()
        padded = nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
        return padded[self.global_rank * size :][:size]
