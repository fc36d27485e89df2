"""DeepSpeed's ZeRO, on GPUs or on CPU processes over gloo.

``trainer.strategy`` of a recipe: ``{class_path: mmfusion.training.strategies.zero.ZeRO, init_args:
{stage: 3}}``. Optimizer state and gradients of everything that trains are divided among the ranks.
In stage 3 so are the LLM's weights, which are gathered where they are used: a collective that every
rank has to reach as often, in the same order. Whatever runs more often on one rank than on another
keeps whole weights therefore (see :func:`whole_modules`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from mmfusion.data.datamodule import data_of
from mmfusion.training.callbacks.validation import Validation
from mmfusion.training.checkpoint import trained_names
from mmfusion.training.module import MultimodalModule


class ZeRO(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, made to run on CPUs too, with its silent faults repaired.

    Args:
        stage: 1 divides optimizer state among the ranks, 2 gradients too, 3 the LLM's weights too.
        options: more fields of ``zero_optimization`` in DeepSpeed's configuration.
    """

    strategy_name = "zero"

    def __init__(self, stage: Literal[1, 2, 3] = 2, options: dict[str, Any] | None = None) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read where deepspeed is imported
        # Its batch size counts samples a second in logs; "auto" opens the data for it.
        super().__init__(stage=stage, logging_batch_size_per_gpu=1)
        self.stage = stage
        cast(dict[str, Any], self.config)["zero_optimization"] |= options or {}

    @property
    def _on_cpu(self) -> bool:
        return self.root_device.type == "cpu"

    @property
    def _module(self) -> MultimodalModule:
        return cast(MultimodalModule, self.lightning_module)

    # ---- processes

    def setup_environment(self) -> None:
        """Lightning's own takes GPUs alone."""
        if (given := self.precision_plugin.precision) != "32-true":
            raise ValueError(
                f"trainer.precision is {given}; ZeRO trains in 32-true so far. Leave it out, or "
                "use another trainer.strategy."
            )
        self.precision_plugin = _Precision("32-true")
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

    # ---- the model

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Parts are built whole: under ``zero.Init`` what is initialised in place, and what PEFT
        adds, would be other than it says, without an error (lora_B at 0.5 instead of 0).
        """
        self._init_config_if_needed()
        if self.stage == 3:
            self._refuse_answers()
        yield

    def _refuse_answers(self) -> None:
        """Ranks would run the LLM as often as their answers are long, and wait for one another."""
        trainer = self._module.trainer
        asked = {
            name: value
            for callback in cast(Any, trainer).callbacks
            if isinstance(callback, Validation) and data_of(trainer).val_sources
            for name in ("generate_samples", "table_samples", "media_samples")
            if (value := getattr(callback.asking, name))
        }
        if asked:
            raise ValueError(
                f"validation has {asked}, but under ZeRO stage 3 the LLM cannot generate so far. "
                "Set these to 0 (mmfusion validate on one process asks a checkpoint), or use "
                "stage 2."
            )

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
            _refuse_half(model)
            _refuse_numbers(model)
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

    # ---- checkpoints: the same files as without ZeRO, by rank 0

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, gathered; every rank must call it."""
        import deepspeed

        state, kept = self._module.state_dict(keep_vars=True), {}
        for name in sorted((trained_names(self._module) | self._module.inherited) & set(state)):
            away = [p for p in [state[name]] if p.numel() == 0]  # not those that are kept whole
            with deepspeed.zero.GatheredParameters(away):
                kept[name] = state[name].detach().clone()
        return kept

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """As the optimizer by itself would give it, gathered; every rank must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_states()
        inner, groups = optimizer.optimizer, []
        state: dict[int, dict[str, Tensor]] = {}
        one: dict[str, Tensor] = next(iter(inner.state.values()), {})
        for group, options in zip(self._module.groups, inner.param_groups, strict=True):
            first = len(state)
            for parameter in group["params"]:
                state[len(state)] = {
                    key: value.clone()
                    if key == "step"
                    else safe_get_full_optimizer_state(parameter, key)
                    for key, value in one.items()
                }
            groups.append({**options, "params": [*range(first, len(state))]})
        return {"state": state, "param_groups": groups}

    def _link_states(self) -> None:
        """To their parameters; stages 1 and 2 do so by themselves for the first group alone."""
        if self.stage < 3:
            optimizer = self.deepspeed_engine.optimizer
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Not by the engine."""
        DDPStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    restore_checkpoint_after_setup = False
    """Weights are loaded before they are divided."""
    lightning_restore_optimizer = True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Not by the engine."""
        return DDPStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """As without ZeRO."""
        DDPStrategy.load_model_state_dict(self, checkpoint, strict)

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


def _refuse_half(model: nn.Module) -> None:
    """DeepSpeed computes in one precision, whatever a part is kept in."""
    half = [name for name, p in model.named_parameters() if p.dtype in (torch.bfloat16, torch.half)]
    if half:
        raise ValueError(
            f"{len(half)} parameters are in half precision ({half[0]}, ...); ZeRO trains in fp32 "
            "so far. Set dtype: float32 of the LLM and of parts that train."
        )


def _refuse_numbers(model: nn.Module) -> None:
    """DeepSpeed sends weights as bytes, as which it cannot see those without a dimension."""
    if numbers := [name for name, p in model.named_parameters() if p.ndim == 0]:
        raise ValueError(
            f"{len(numbers)} parameters have no dimension ({numbers[0]}, ...); ZeRO takes those of "
            "one or more. Make them of shape (1,), or use another trainer.strategy."
        )


def whole_modules(module: MultimodalModule) -> list[nn.Module]:
    """Modules whose own weights every rank holds: all but the LLM's, and the LLM's output head,
    which the loss runs once for each chunk of a rank's supervised tokens.
    """
    llm = set(module.model.llm.modules()) - set(module.model.llm.head.modules())
    return [part for part in module.modules() if part not in llm and part is not module]


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
