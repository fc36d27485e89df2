"""Before step 1: what trains, printed and logged; after the first backward pass, whether it can.

What cannot be meant (nothing trains, a policy that matches nothing, new tokens neither trained nor
loaded) the module refuses while it is built.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, astuple, fields
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.hooks import RemovableHandle

from mmfusion.audit import check_reaches_loss
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.bfloat16 import HALF, computes_bfloat16
from mmfusion.training.module import MultimodalModule
from mmfusion.training.wandb_run import wandb_of
from mmfusion.types import Batch

log = logging.getLogger(__name__)

ANSWERS = " in its answers"
"""Where media of output projectors are; those of input projectors are anywhere else."""


class Audit(L.Callback):
    """Prints part, class, parameters, trainable, dtype and rate; fails where a trainable parameter
    reached no loss, warns where a modality that trains is in no sample.

    Args:
        warn_after: optimizer steps without a single item of a modality before the warning.
    """

    def __init__(self, warn_after: int = 100) -> None:
        self.warn_after = warn_after
        self._checked = False
        self._reached: dict[torch.nn.Parameter, None] = {}
        self._hooks: list[RemovableHandle] = []
        self._began = 0
        self._seen: dict[tuple[str, str], bool] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the table before anything is spent."""
        module = cast(MultimodalModule, pl_module)
        table = module.audit
        assert table is not None
        log.info("what trains:\n%s", table)
        _warn(trainer, module)
        if trainer.is_global_zero and (wandb := wandb_of(trainer)) and table.rows:
            columns = [field.name for field in fields(table.rows[0])]
            rows = [list(astuple(row)) for row in table.rows]
            wandb.log_table("audit", columns=columns, data=rows)
        for logger in trainer.loggers:
            logger.log_hyperparams({"audit": {row.part: asdict(row) for row in table.rows}})
        self._checked = False
        self._seen = dict.fromkeys(_training_modalities(module), False)
        self._began = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """``validate`` has no start of a fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            _warn(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As before ``validate``."""
        _warn(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As before ``validate``."""
        _warn(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Note which modalities came; warn once of those that never did."""
        for what, modality in self._seen:
            held = batch.host.targets if what == ANSWERS else batch.host.media
            self._seen[what, modality] |= not held[modality].idle
        if not self._seen or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        steps = trainer.global_step - self._began
        if steps == self.warn_after or trainer.global_step == trainer.max_steps:
            mine = torch.tensor(list(self._seen.values()), dtype=torch.int32)
            seen = trainer.strategy.reduce(mine.to(pl_module.device), reduce_op="sum")
            never = [name for name, n in zip(self._seen, seen.tolist(), strict=True) if not n]
            for place in dict.fromkeys(what for what, _ in never):
                log.warning(
                    "no sample of the last %d steps held media of %s%s, though its part trains: it "
                    "learned nothing in them; add a source with such media, or freeze the part",
                    steps,
                    ", ".join(modality for what, modality in never if what == place),
                    place,
                )

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor
    ) -> None:
        """Watch for gradients: ZeRO takes them away as they come."""
        if not self._checked:
            for parameter in pl_module.parameters():
                if parameter.requires_grad:
                    note = partial(self._reached.setdefault, parameter)
                    self._hooks.append(parameter.register_hook(lambda grad, note=note: note(None)))

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check once that every trainable parameter has a gradient."""
        if not self._checked:
            for hook in self._hooks:
                hook.remove()
            check_reaches_loss(cast(MultimodalModule, pl_module).model, self._reached)
            self._checked = True


def _warn(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    model = cast(MultimodalModule, pl_module).model
    warn_of_half(model, str(trainer.precision), pl_module.device)


def warn_of_half(model: AnyToAnyModel, precision: str, device: torch.device) -> None:
    """Where a CPU would take a hundred times as long as it needs.

    Args:
        model: built, as far as it is run.
        precision: of the trainer.
        device: where it is run.
    """
    if computes_bfloat16(device):
        return
    parts = {".".join(n.split(".")[:2]) for n, p in model.named_parameters() if p.dtype in HALF}
    places = [*(["trainer.precision"] if "16" in precision else []), *sorted(parts)]
    if places:
        log.warning(
            "%s: half precision, for which this CPU has no instructions: it may take a hundred "
            "times as long as float32. Use --trainer.precision=32-true, and dtype: float32 of the "
            "parts (--model.llm.init_args.dtype=float32)",
            ", ".join(places),
        )


def _training_modalities(module: MultimodalModule) -> list[tuple[str, str]]:
    """Modalities whose encoder or projector trains, with where a sample holds their media."""
    model = module.model
    parts = [
        *((("", m), (model.encoders[m], model.input_projectors[m])) for m in model.encoders),
        *(((ANSWERS, m), (model.output_projectors[m],)) for m in model.output_projectors),
    ]
    return [
        place
        for place, own in parts
        if any(parameter.requires_grad for part in own for parameter in part.parameters())
    ]
