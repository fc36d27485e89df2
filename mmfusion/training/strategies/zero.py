"""DeepSpeed's ZeRO, on GPUs or on CPU processes over gloo.

``strategy: deepspeed_3`` of a recipe, or as ``trainer.strategy`` the class with its arguments.
Optimizer state and gradients of everything that trains are divided among the ranks. In stage 3 so
are the LLM's weights, which are gathered where they are used (see :func:`whole_modules`).
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from mmfusion.paths import expand
from mmfusion.training.checkpoint import trained_names
from mmfusion.training.module import MultimodalModule
from mmfusion.training.sharded import Part
from mmfusion.training.strategies.shares import (
    GatheredCheckpoints,
    frozen_parts,
    on_one,
    refuse_answers,
    refuse_half,
    refuse_numbers,
    refuse_quantised,
)

PRECISIONS = ("32-true", "bf16-mixed")


class ZeRO(GatheredCheckpoints, DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, made to run on CPUs too, with its silent faults repaired.

    Args:
        stage: 1 divides optimizer state among the ranks, 2 gradients too, 3 the LLM's weights too.
        offload: keep the optimizer's state, and in stage 3 what is divided of the LLM, in the
            host's memory (``cpu``) or on disks (``nvme``); the step is made there.
        nvme_path: folder on the disks for ``nvme``.
        config: fields of DeepSpeed's configuration, laid over what this strategy sets; or the path
            of a JSON file with such.
        process_group_backend: of torch.distributed (None: NCCL on GPUs, gloo on CPUs).
    """

    strategy_name = "zero"

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload: Literal["cpu", "nvme"] | None = None,
        nvme_path: str | None = None,
        config: dict[str, Any] | str | None = None,
        process_group_backend: str | None = None,
    ) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read where deepspeed is imported
        if (offload == "nvme") != bool(nvme_path):
            raise ValueError(
                f"ZeRO: offload is {offload}, nvme_path {nvme_path}; give a folder with nvme, and "
                "none without."
            )
        # Its batch size counts samples a second in logs; "auto" opens the data for it.
        super().__init__(
            stage=stage,
            logging_batch_size_per_gpu=1,
            offload_optimizer=offload is not None,
            offload_parameters=offload is not None and stage == 3,
            offload_optimizer_device=offload or "cpu",
            offload_params_device=offload or "cpu",
            nvme_path=nvme_path or "",
            pin_memory=torch.cuda.is_available(),
            process_group_backend=process_group_backend,
        )
        self.stage, self.offload, self.sharded = stage, offload, False
        own = cast(dict[str, Any], self.config)
        own["zero_force_ds_cpu_optimizer"] = False  # the recipe's optimizer is taken
        _lay_over(own, _fields(config))
        if own["zero_optimization"]["stage"] != stage:
            raise ValueError("ZeRO: give the stage as stage, not in config.zero_optimization.")
        for name in ("fp16", "bf16", "torch_autocast"):
            if own.get(name, {}).get("enabled"):
                raise ValueError(
                    f"ZeRO: config.{name} is enabled, which would take every part's weights into "
                    "half precision; set trainer.precision: bf16-mixed instead."
                )

    @property
    def _on_cpu(self) -> bool:
        return self.root_device.type == "cpu"

    @property
    def _module(self) -> MultimodalModule:
        return cast(MultimodalModule, self.lightning_module)

    # ---- processes

    def setup_environment(self) -> None:
        """Lightning's own takes GPUs alone."""
        if (given := self.precision_plugin.precision) not in PRECISIONS:
            raise ValueError(
                f"trainer.precision is {given}; ZeRO trains in {' or '.join(PRECISIONS)}."
            )
        if given == "bf16-mixed":
            # As under DDP: what trains, its gradients and what is sent of it stay in fp32.
            # DeepSpeed switches off an autocast that is not its own.
            cast(dict[str, Any], self.config)["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }
        self.precision_plugin = _Precision(cast(Any, given))
        os.environ.setdefault("LOCAL_SIZE", str(self.num_processes))  # else numactl is asked
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Join the process group."""
        if not self._on_cpu:
            return super().setup_distributed()
        reset_seed()
        self.set_world_ranks()
        # It serves inference, takes a C++ compiler a minute, and leaves 69 MB in /dev/shm a run.
        # (`import deepspeed.comm.torch as comm` would bind torch itself.)
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
        self._init_deepspeed_distributed()

    def _format_config(self) -> None:
        """Lightning would have DeepSpeed keep every weight in bf16."""
        self._format_batch_size_and_grad_accum_config()

    # ---- the model

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Parts are built whole: under ``zero.Init`` what is initialised in place, and what PEFT
        adds, would be other than it says, without an error (lora_B at 0.5 instead of 0).
        """
        self._init_config_if_needed()
        if self.stage == 3:
            refuse_quantised(self._module, "ZeRO stage 3")
            refuse_answers(self._module.trainer, "ZeRO stage 3")
        yield

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        raise ValueError(
            "trainer.strategy is ZeRO, which only trains; validate, test and predict by "
            "--trainer.strategy=auto."
        )

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        import deepspeed

        whole = whole_modules(self._module)
        own = [(h, set(h)) for m in whole for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._frozen = frozen_parts(self._module)
        for owner, name in self._frozen:
            owner.get_submodule(name).to(self.root_device)
        with _left_out(self._frozen):
            refuse_half(self._module)
            refuse_numbers(model)
            if self.stage == 3:
                self._divide()
                model.to(self.root_device)
            engine, optimizer, _, _ = deepspeed.initialize(
                config=self.config,
                model=model,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                optimizer=optimizer,
                lr_scheduler=lr_scheduler,
                dist_init_required=False,
            )
        if self.stage == 3:
            for hooks, before in own:
                for key in set(hooks) - before:
                    del hooks[key]
            kept = {p: None for m in whole for p in m.parameters(recurse=False)}
            self._whole: list[Any] = [p for p in kept if hasattr(p, "ds_id")]
            known = set(optimizer.persistent_parameters)  # what is small, DeepSpeed keeps by itself
            for parameter in self._whole:
                parameter.ds_persist = True  # gathered after each step, and never given away
            optimizer.persistent_parameters += [p for p in self._whole if p not in known]
            self._gather_whole()
        return engine, optimizer

    def _divide(self) -> None:
        """The LLM, weight by weight as they come from their file, where they are left as long.

        DeepSpeed by itself moves all of it to the device first.
        """
        import deepspeed

        options = {"config_dict_or_path": self.config, "remote_device": self.offload}
        init = deepspeed.zero.Init(nn.Module(), **options)
        for parameter in self._module.model.llm.parameters():
            parameter.data = parameter.data.to(self.root_device, copy=True)
            init._convert_to_zero_parameters([parameter])

    def _gather_whole(self) -> None:
        if self._whole:
            self._whole[0].all_gather(self._whole)

    # ---- a step: Lightning owns accumulation

    @property
    def handles_gradient_accumulation(self) -> bool:
        """DeepSpeed would divide by the micro-batches a second time, and step across the data's
        end.
        """
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Stages 2 and 3 reduce every micro-batch."""
        yield

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Through the engine, told whether the step ends here."""
        if self._module.leaves_step_out:
            # DeepSpeed leaves out a step whose gradients are not finite. With gradients of zero
            # momentum and decay would move the weights.
            closure_loss = closure_loss * torch.nan
        accumulates = self._module.trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(not accumulates)
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(
        self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Step, unless this step is left out; forget its gradients."""
        module, engine = self._module, self.deepspeed_engine
        closure()
        self.precision_plugin._after_closure(module, optimizer)
        with _left_out(self._frozen):
            engine.step()
        if not engine.was_step_applied() and not module.leaves_step_out:
            module.refuse_step()
        if self.stage == 3:
            self._gather_whole()
            # A part that no rank uses in the next step would be moved by these once more.
            engine.optimizer.grad_partitions_flat_buffer.zero_()

    def teardown(self) -> None:
        """Let go of the model: a run that goes back makes another one in this process."""
        engine = cast(Any, self.model)
        super().teardown()
        if hasattr(engine, "destroy"):
            engine.destroy()

    @property
    def grad_norm(self) -> float:
        """Of all gradients of the last step, before clipping."""
        return float(self.deepspeed_engine.get_global_grad_norm() or 0.0)

    # ---- checkpoints: the same files as without ZeRO, by rank 0

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
                    if key == "step"
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
                key: value.clone() if key == "step" else torch.zeros_like(share)
                for key, value in saved[0].items()
            }
        self._link_states()
        parameters = [p for group in self._module.groups for p in group["params"]]
        for place, parameter in enumerate(parameters):
            for key, value in saved[place].items():
                if key == "step":
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


class _Precision(DeepSpeedPrecision):
    """Parts and batches stay as they are: each part has its own precision, and batches hold values
    that cannot be rebuilt.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data


def _fields(config: dict[str, Any] | str | None) -> dict[str, Any]:
    if not isinstance(config, str):
        return config or {}
    path = Path(expand(config))
    if not path.is_file():
        raise FileNotFoundError(f"ZeRO: config {path} is not a file.")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"ZeRO: config {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"ZeRO: config {path} holds a {type(found).__name__}; expected an object.")
    return found


def _lay_over(own: dict[str, Any], given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(own.get(key), dict):
            _lay_over(own[key], value)
        else:
            own[key] = value


def whole_modules(module: MultimodalModule) -> list[nn.Module]:
    """Modules whose own weights every rank holds: all but the LLM's, and the LLM's output head,
    which the loss runs once for each chunk of a rank's supervised tokens.
    """
    llm = set(module.model.llm.modules()) - set(module.model.llm.head.modules())
    return [part for part in module.modules() if part not in llm and part is not module]


@contextmanager
def _left_out(parts: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """DeepSpeed shards every parameter that it finds; these it does not find."""
    taken = [(owner, name, owner._modules[name]) for owner, name in parts]
    for owner, name, _ in taken:
        owner._modules[name] = nn.Identity()
    try:
        yield
    finally:
        for owner, name, part in taken:
            owner._modules[name] = part
