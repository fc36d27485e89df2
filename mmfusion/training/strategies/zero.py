"""DeepSpeed's ZeRO, on GPUs or on CPU processes over gloo.

``strategy: deepspeed_3`` of a recipe, or as ``trainer.strategy`` the class with its arguments.
Optimizer state and gradients of everything that trains are divided among the ranks. In stage 3 so
are the LLM's weights, which are gathered where they are used (see :func:`whole_modules`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from mmfusion.training.module import MultimodalModule
from mmfusion.training.strategies import zero_config
from mmfusion.training.strategies.shares import (
    ask_nothing,
    divide,
    divided_parts,
    frozen_parts,
    refuse_half,
    refuse_numbers,
    refuse_optimizer,
    refuse_quantised,
)
from mmfusion.training.strategies.zero_checkpoints import ZeROCheckpoints

PRECISIONS = ("32-true", "bf16-mixed")


class ZeRO(ZeROCheckpoints, DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, made to run on CPUs too, with its silent faults repaired.

    Args:
        stage: 1 divides optimizer state among the ranks, 2 gradients too, 3 the LLM's weights too.
        offload: keep the optimizer's state, and in stage 3 what is divided of the LLM, in the
            host's memory (``cpu``) or, in stage 3, on disks (``nvme``); the step is made there.
        divide_encoders: in stage 3, share frozen encoders too, which else every rank holds whole. A
            rank without media of a modality then runs its encoder all the same.
        divide_denoisers: as divide_encoders, of the generators' U-Nets and transformers.
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
        divide_encoders: bool = False,
        divide_denoisers: bool = False,
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
        if offload == "nvme" and stage != 3:
            raise ValueError(
                f"ZeRO: offload is nvme and the stage {stage}, where DeepSpeed would take the "
                "host's memory without a word. Set stage: 3, or offload: cpu."
            )
        asked = {"divide_encoders": divide_encoders, "divide_denoisers": divide_denoisers}
        if stage != 3 and (odd := [name for name, value in asked.items() if value]):
            raise ValueError(f"ZeRO: {odd[0]} is for stage 3, and the stage is {stage}.")
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
        self.divide_encoders, self.divide_denoisers = divide_encoders, divide_denoisers
        own = cast(dict[str, Any], self.config)
        own["zero_force_ds_cpu_optimizer"] = False  # the recipe's optimizer is taken
        zero_config.lay_over(own, zero_config.fields(config))
        zero_config.refuse_sections(own, stage)

    @property
    def _on_cpu(self) -> bool:
        return self.root_device.type == "cpu"

    # ---- processes

    def setup_environment(self) -> None:
        """Lightning's own takes GPUs alone."""
        refuse_precision(given := self.precision_plugin.precision)
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

    @property
    def widens_llm(self) -> bool:
        """In stage 3, weight by weight."""
        return self.stage == 3

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Parts are built whole: under ``zero.Init`` what is initialised in place, and what PEFT
        adds, would be other than it says, without an error (lora_B at 0.5 instead of 0).
        """
        self._init_config_if_needed()
        zero_config.refuse_unread(cast(dict[str, Any], self.config))
        if self.stage == 3:
            refuse_quantised(self._module, "ZeRO stage 3")
            ask_nothing(self._module.trainer, "ZeRO stage 3")
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

        if optimizer is not None:
            refuse_optimizer(optimizer, "ZeRO")
        divide(self._module, self.divide_encoders, self.divide_denoisers)
        whole = whole_modules(self._module)
        own = [(h, set(h)) for m in whole for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._frozen = frozen_parts(self._module)
        for owner, name in self._frozen:
            owner.get_submodule(name).to(self.root_device)
        with left_out(self._frozen):
            refuse_numbers(model)
            if self.stage == 3:
                self._divide()
                model.to(self.root_device)
            refuse_half(self._module)
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
        shared = [self._module.model.llm, *divided_parts(self._module)]
        names = {parameter: name for name, parameter in self._module.named_parameters()}
        for parameter in chain(*(part.parameters() for part in shared)):
            self.own(parameter, names, self.root_device)
            init._convert_to_zero_parameters([parameter])
        self._unread = {}

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
        with left_out(self._frozen):
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


class _Precision(DeepSpeedPrecision):
    """Parts and batches stay as they are: each part has its own precision, and batches hold values
    that cannot be rebuilt.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data


def whole_modules(module: MultimodalModule) -> list[nn.Module]:
    """Modules whose own weights every rank holds: all but the LLM's and those of parts that are
    divided; and the LLM's output head, which the loss runs once for each chunk of a rank's
    supervised tokens.
    """
    shared = set(module.model.llm.modules()) - set(module.model.llm.head.modules())
    shared |= set(chain(*(part.modules() for part in divided_parts(module))))
    return [part for part in module.modules() if part not in shared and part is not module]


def refuse_precision(given: str) -> None:
    """Refuse those that DeepSpeed would train otherwise than DDP does.

    Raises:
        ValueError: for them.
    """
    if given not in PRECISIONS:
        raise ValueError(f"trainer.precision is {given}; ZeRO trains in {' or '.join(PRECISIONS)}.")


@contextmanager
def left_out(parts: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """DeepSpeed shards every parameter that it finds; these it does not find."""
    taken = [(owner, name, owner._modules[name]) for owner, name in parts]
    for owner, name, _ in taken:
        owner._modules[name] = nn.Identity()
    try:
        yield
    finally:
        for owner, name, part in taken:
            owner._modules[name] = part
