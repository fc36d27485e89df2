"""PyTorch's fully sharded data parallel (FSDP2), on GPUs or on CPU processes over gloo.

``strategy: fsdp2`` of a recipe. Every weight of the LLM and of what trains, its gradient and its
optimizer state are divided among the ranks. Each layer of the LLM is gathered when it runs and
given away after it; everything else that is divided is gathered once a step. A step is one call of
the whole module, its losses included: so ranks gather as often, whichever media they have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mmfusion.training.checkpoint import trained_names
from mmfusion.training.gradients import clip_by_norm
from mmfusion.training.module import MultimodalModule
from mmfusion.training.sharded import Part
from mmfusion.training.strategies.shares import (
    GatheredCheckpoints,
    ask_nothing,
    divide,
    divided_parts,
    frozen_parts,
    on_one,
    refuse_half,
    refuse_numbers,
    refuse_optimizer,
    refuse_quantised,
    repeated,
)
from mmfusion.training.strategies.tensor import divide_layers


class FSDP2(GatheredCheckpoints, ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with the division done here, and checkpoints that are those
    of one process.

    Args:
        offload: keep what is divided in the host's memory, and step there.
        reshard: give a layer's weights away after its forward pass, to gather them once more for
            its backward pass; False takes more memory and less communication.
        divide_encoders: share frozen encoders too, which else every rank holds whole. A rank
            without media of a modality then runs its encoder all the same.
        divide_denoisers: as divide_encoders, of the generators' U-Nets and transformers.
        tensor_parallel: neighbouring ranks that compute each layer of the LLM together, on the same
            packs, by the plan of the LLM's family; what else is divided, is among the others.
        process_group_backend: of torch.distributed (None: NCCL on GPUs, gloo on CPUs).
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        offload: bool = False,
        reshard: bool = True,
        divide_encoders: bool = False,
        divide_denoisers: bool = False,
        tensor_parallel: int = 1,
        process_group_backend: str | None = None,
    ) -> None:
        if tensor_parallel < 1:
            raise ValueError(f"FSDP2: tensor_parallel is {tensor_parallel}; expected 1 or more.")
        super().__init__(
            tensor_parallel_size=tensor_parallel,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )
        self.offload, self.reshard, self.tensor_parallel = offload, reshard, tensor_parallel
        self.divide_encoders, self.divide_denoisers = divide_encoders, divide_denoisers
        self.sharded = False

    @property
    def _module(self) -> MultimodalModule:
        return cast(MultimodalModule, self.lightning_module)

    @property
    def _mesh(self) -> DeviceMesh:
        return self.device_mesh["data_parallel"]

    def setup_environment(self) -> None:
        """All ranks share one copy of the weights."""
        self._setup_distributed()
        # Lightning's own hands the mesh to a module, which has none yet where ranks agree on a
        # checkpoint.
        names = ("data_parallel", "tensor_parallel")
        shape = (self.world_size // self.tensor_parallel, self.tensor_parallel)
        if self.world_size % self.tensor_parallel:
            raise ValueError(
                f"FSDP2: tensor_parallel is {self.tensor_parallel}, which does not divide the "
                f"{self.world_size} processes."
            )
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        for name in names:  # else torch's own, half an hour
            _set_pg_timeout(cast(timedelta, self._timeout), self._device_mesh.get_group(name))

    # ---- the model

    @property
    def widens_llm(self) -> bool:
        """Layer by layer."""
        return True

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Parts are built as on one process."""
        refuse_quantised(self._module, "FSDP2")
        ask_nothing(self._module.trainer, "FSDP2")
        if self.tensor_parallel > 1 and self.sharded:
            raise ValueError(
                "checkpoint.sharded is set with tensor_parallel, whose shares of a weight are not "
                "contiguous. Leave checkpoint.sharded out."
            )
        yield

    def setup(self, trainer: L.Trainer) -> None:
        """Divide the module, then make the optimizer of what each rank has."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self._divide()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                refuse_optimizer(optimizer, "FSDP2")
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING and not self.offload:
            _optimizers_to_device(self.optimizers, self.root_device)

    def teardown(self) -> None:
        """Lightning's does not wait for a checkpoint that is being written."""
        super().teardown()
        self.checkpoint_io.teardown()

    def _divide(self) -> None:
        module = self._module
        divide(module, self.divide_encoders, self.divide_denoisers)
        refuse_numbers(module)
        names = {parameter: name for name, parameter in module.named_parameters()}
        groups = [[names[p] for p in group["params"]] for group in module.groups]
        whole = [owner.get_submodule(name) for owner, name in frozen_parts(module)]
        for part in whole:
            part.to(self.root_device)
        if self.tensor_parallel > 1:
            self.widen(names, names)  # all of it at once
            self._unread = {}
            divide_layers(module.model.llm, self.device_mesh["tensor_parallel"])
            # PyTorch's own does not add up what lies on several meshes.
            cast(Any, self.precision_plugin).clip_grad_by_norm = clip_by_norm
        options: dict[str, Any] = {"mesh": self._mesh}
        if self.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.root_device.type != "cpu")
        half = self.precision_plugin.precision == "bf16-mixed"
        # Autocast would compute in bf16 anyway: gathered in it, a layer is half as much to send.
        layers = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for layer in module.model.llm.layers:
            whole_of_layer = [p for p in layer.parameters() if p in names]
            self.widen(whole_of_layer, names)
            fully_shard(layer, reshard_after_forward=self.reshard, mp_policy=layers, **options)
            for parameter in whole_of_layer:  # other parameters have their place now
                parameter.data = parameter.data.new_empty(0)
        for divided in divided_parts(module):
            for part in [*repeated(divided), divided]:
                fully_shard(part, reshard_after_forward=True, **options)
        self.widen((p for p in module.parameters() if p in names), names)
        self._unread = {}
        refuse_half(module)
        fully_shard(
            module, ignored_params={p for part in whole for p in part.parameters()}, **options
        )
        now = dict(module.named_parameters())
        for group, held in zip(module.groups, groups, strict=True):
            group["params"] = [now[name] for name in held]

    def average_copies(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a step, of gradients that the ranks of a group have computed alike: but for
        rounding, which differs on GPUs, and would drive their weights apart.
        """
        held = (p.grad for group in optimizer.param_groups for p in group["params"])
        copies = [
            cast(DTensor, gradient).to_local()
            for gradient in held
            if gradient is not None and "tensor_parallel" not in _dimensions(gradient)
        ]
        if not copies:
            return
        flat = torch.cat([copy.flatten() for copy in copies])
        torch.distributed.all_reduce(flat, group=self.device_mesh.get_group("tensor_parallel"))
        means = (flat / self.tensor_parallel).split([copy.numel() for copy in copies])
        for copy, mean in zip(copies, means, strict=True):
            copy.copy_(mean.view_as(copy))

    # ---- a step: one call of the whole module

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """A micro-batch."""
        with self.precision_plugin.train_step_context():
            return self._called("training_step", *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """As a training step, without gradients."""
        with self.precision_plugin.val_step_context():
            return self._called("validation_step", *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """As a validation."""
        with self.precision_plugin.test_step_context():
            return self._called("test_step", *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """As a validation."""
        with self.precision_plugin.predict_step_context():
            return self._called("predict_step", *args, **kwargs)

    def _called(self, step: str, *args: Any, **kwargs: Any) -> Any:
        return self._forward_redirection(self._module, self._module, step, *args, **kwargs)

    # ---- checkpoints: the same files as of one process, by rank 0

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, gathered; every rank must call it."""
        state = self._module.state_dict()
        names = (trained_names(self._module) | self._module.inherited) & set(state)
        return {name: self._gathered(state[name]) for name in sorted(names)}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """As the optimizer by itself would give it, gathered; every rank must call it."""
        found = getattr(optimizer, "_optimizer", optimizer).state_dict()
        state = {
            place: {key: self._gathered(value) for key, value in one.items()}
            for place, one in found["state"].items()
        }
        return {**found, "state": state}

    def _gathered(self, value: Tensor) -> Tensor | Part:
        if self.sharded and isinstance(value, DTensor):
            shape = tuple(value.shape)
            _, (row, *_) = compute_local_shape_and_global_offset(
                shape, value.device_mesh, value.placements
            )
            return Part(shape, row * math.prod(shape[1:]), value.to_local())
        if isinstance(value, DTensor):
            value = cast(DTensor, value.to(self.root_device)).full_tensor()
        return value if self.sharded else on_one(value, self.is_global_zero)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its share of what it has read."""
        (optimizer,), (saved,) = self.optimizers, checkpoint["optimizer_states"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            place: {key: self._share(value, parameters[place]) for key, value in one.items()}
            for place, one in saved["state"].items()
        }
        optimizer.load_state_dict({**saved, "state": state})

    def _share(self, value: Tensor, parameter: Tensor) -> Tensor:
        if value.shape != parameter.shape or not isinstance(parameter, DTensor):
            return value.clone()  # AdamW's step; a view would keep the file mapped
        mesh, placements = parameter.device_mesh, parameter.placements
        value = value.to(self.root_device)
        share = distribute_tensor(value, mesh, placements, src_data_rank=None)
        return share.to(parameter.device).clone()  # a view would keep all of it


def _dimensions(tensor: Any) -> tuple[str, ...]:
    """Names of the mesh that it is divided on."""
    return tuple(tensor.device_mesh.mesh_dim_names or ())
