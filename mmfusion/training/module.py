"""The one LightningModule of all stages: parts, tuning, objectives, optimizer.

A stage is a recipe; a loss is an objective; a behaviour is a callback. What is here is what every
stage does: build the parts, say what trains, load what an earlier stage trained, sum the
objectives.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from mmfusion import tuning as tune
from mmfusion.audit import AuditTable, audit
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.encoders.base import Encoder
from mmfusion.models.generators.base import Generator, check_seed
from mmfusion.models.llms.base import LLM
from mmfusion.models.output_projectors.base import OutputProjector
from mmfusion.models.projectors.base import Projector
from mmfusion.models.speakers.base import Speaker
from mmfusion.objectives.base import Loss, Objective, TargetObjective
from mmfusion.training.checkpoint import trained_names
from mmfusion.training.gradients import total_norm
from mmfusion.training.schedules import WarmupDecay
from mmfusion.training.sequence import join_group, own_part
from mmfusion.training.trained_weights import (
    check_order,
    check_own,
    keep_trained,
    load_earlier,
    load_own,
)
from mmfusion.tuning import Policy
from mmfusion.types import Batch, BatchSample, Conditioning, ConditioningSpec

if TYPE_CHECKING:
    from mmfusion.training.callbacks.guard import Guard

RECIPE_OPTIONS = ("initial_lr", "weight_decay", "betas", "eps")
"""Options of an optimizer group that the recipe gives, also to a resumed run."""


def adamw(params: Iterable[Any]) -> torch.optim.Optimizer:
    """AdamW as LLMs are trained with; rates and weight decays come from the tuning policies."""
    return torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


@dataclass
class Evaluated:
    """What a batch of a validation or a test gives to callbacks.

    Attributes:
        batch: this rank's part of it.
        losses: of each objective.
        conditioning: of the targets of each modality the model makes.
    """

    batch: Batch
    losses: dict[str, Loss]
    conditioning: dict[str, Conditioning]


class MultimodalModule(L.LightningModule):
    """Trains the parts of a recipe.

    Args:
        encoders: modality encoder of each modality.
        input_projectors: input projector of each modality; the widths are filled in.
        llm: the LLM backbone.
        objectives: the losses, summed by their weights.
        tuning: for each part (``llm``, ``input_projectors``, ``encoders.image``, ...) how it
            trains; a part that is not named is frozen.
        signal_tokens: for each modality that the model makes, how many signal tokens stand for an
            item.
        output_projectors: output projector of each of them; the widths are filled in.
        generators: modality generator of each of them.
        speaker: says aloud the words of answers that are to be spoken; a recipe that trains when
            to speak needs it for the signal tokens, but never loads its weights.
        optimizer: made with the parameter groups of the tuning policies.
        schedule: learning rate by optimizer step.
        init_from: an earlier run (or one of its checkpoints) whose trained weights this one starts
            from.
        init_drop: parts of that run (``llm``, ``input_projectors.audio``) whose weights are left
            behind; any other weight without a place here is refused.
        compile: compile the LLM's layers with torch.compile (on a CPU this needs a C++ compiler).
        seed: of new weights and of dropout; None takes ``seed_everything``.
    """

    def __init__(
        self,
        encoders: dict[str, Encoder],
        input_projectors: dict[str, Callable[[int, int], Projector]],
        llm: LLM,
        objectives: dict[str, Objective],
        tuning: dict[str, Policy | list[Policy]],
        signal_tokens: dict[str, int] | None = None,
        output_projectors: dict[str, Callable[[int, ConditioningSpec], OutputProjector]]
        | None = None,
        generators: dict[str, Generator] | None = None,
        speaker: Speaker | None = None,
        optimizer: OptimizerCallable = adamw,
        schedule: WarmupDecay = WarmupDecay(),  # noqa: B008 (frozen)
        init_from: str | None = None,
        init_drop: list[str] | None = None,
        compile: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not objectives:
            raise ValueError("model.objectives is empty: name at least one loss.")
        for name, objective in objectives.items():
            if not 0 <= objective.weight < math.inf:
                raise ValueError(
                    f"model.objectives.{name}: weight is {objective.weight}; expected 0 or more, "
                    "finite."
                )
        if not any(objective.weight for objective in objectives.values()):
            raise ValueError(
                f"model.objectives {sorted(objectives)} have weight 0: nothing would train. Give "
                "one of them a weight above 0."
            )
        made = set(generators or {})
        aims = {n: o for n, o in objectives.items() if isinstance(o, TargetObjective)}
        if odd := [name for name, aim in aims.items() if aim.modality not in made]:
            raise ValueError(
                f"the objectives {odd} are of modalities without a generator; there are generators "
                f"for {sorted(made)}."
            )
        of = {m: [aim for aim in aims.values() if aim.modality == m] for m in made}
        self.model = AnyToAnyModel(
            encoders,
            input_projectors,
            llm,
            signal_tokens,
            output_projectors,
            generators,
            needs={m: frozenset().union(*(aim.needs for aim in found)) for m, found in of.items()},
            captioned=[m for m, found in of.items() if any(aim.captions for aim in found)],
            speaker=speaker,
            step_captions=[m for m, found in of.items() if any(a.step_captions for a in found)],
        )
        given = {modality: self.model.given(modality) for modality in self.model.generators}
        for aim in aims.values():
            aim.check(self.model.generator(aim.modality), given[aim.modality])
        for modality, parts in tune.named_parts(tuning, self.model).items():
            self.model.need(modality, parts)
        self.objectives = nn.ModuleDict(objectives)
        # A NaN stays one. ("disable" would also disable the weights, in torchmetrics 1.9.)
        self.means = nn.ModuleDict({n: MeanMetric(nan_strategy=math.nan) for n in objectives})
        """Over the terms of an evaluation, on all ranks."""
        self.terms = nn.ModuleDict({name: SumMetric() for name in objectives})
        self.tuning = tuning
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.init_from = init_from
        self.init_drop = init_drop or []
        self.compile_llm = compile
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        check_seed("model.seed", self.seed)
        self.inherited: set[str] = set()
        """Names of the weights that came from an earlier stage; checkpoints keep them."""
        self.strict_loading = False  # on_load_checkpoint is stricter: it knows what must be there
        self.groups: list[tune.ParamGroup] = []
        """The optimizer's groups, once the model is built."""
        self.audit: AuditTable | None = None
        """What trains; made before the optimizer."""
        self.flags: dict[str, Callable[[], int]] = {}
        """What callbacks want summed over the ranks once a step, together with its targets."""
        self.agreed: dict[str, Tensor] = {}
        """The sums of :attr:`flags` as they were when the step began, the same on every rank."""
        self._built = self._fitting = False
        self._options: list[dict[str, Any]] = []
        self._step_counts: dict[str, Tensor] = {}
        self._step_losses: dict[str, Tensor] = {}
        self.step_samples: list[BatchSample] = []
        """This rank's, of the optimizer step so far."""
        self.guard: Guard | None = None
        """What becomes of steps that would do harm; without one they end the run."""
        self._spike = False

    # ---- building

    def configure_model(self) -> None:
        """Build the parts, apply the tuning, load the earlier stage; once."""
        if self._built:
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.model.build()
            torch.manual_seed(self.seed)  # adapters are drawn alike, whatever was built
            strategy = cast(Any, self.trainer.strategy if self._trainer is not None else None)
            divides = strategy if getattr(strategy, "widens_llm", False) else None
            self.groups = tune.apply(self.model, self.tuning, widen_llm=divides is None)
        if self.init_from:
            self.inherited = load_earlier(self, self.init_from, self.init_drop, divides)
        if self.compile_llm:
            self.model.llm.compile_layers()
        self._built = True
        if self._fitting:
            loaded = {name.removeprefix("model.") for name in self.inherited}
            self.audit = audit(self.model, self.groups, loaded)

    def resume(self, names: Iterable[str]) -> None:
        """Call before the parts are built where the run goes on from a checkpoint, which takes the
        place of ``init_from``.

        Args:
            names: of the checkpoint's tensors.
        """
        self.init_from, self.inherited = None, set(names)

    def setup(self, stage: str) -> None:
        """Split each optimizer step into this world's micro-batches; check the schedule, before
        anything is loaded.
        """
        self._fitting = stage == "fit"
        data, given = cast(Any, self.trainer).datamodule, self.trainer.accumulate_grad_batches
        splits = data.micro_batches_per_step(self.trainer.world_size)
        if data.ranks_per_pack > self.copies and self.model.sequence_group is None:
            self.model.sequence_group = join_group(
                data.ranks_per_pack, getattr(self.trainer.strategy, "_timeout", None)
            )
        if not self._fitting:
            return
        self.schedule.check(self.trainer.max_steps)
        if given not in (1, splits):
            raise ValueError(
                f"trainer.accumulate_grad_batches is {given}, but data.packs_per_step and "
                f"data.packs_per_micro_batch give {splits} micro-batches a step on "
                f"{self.trainer.world_size} processes; leave it out and change those."
            )
        self.trainer.accumulate_grad_batches = splits

    # ---- a training step

    def on_fit_start(self) -> None:
        """Loading leaves modules in evaluation mode, and Lightning keeps what it finds."""
        self.train()

    def on_train_start(self) -> None:
        """What the recipe says of rates and decays holds, not what a checkpoint says."""
        optimizer, scheduler = self.trainer.optimizers[0], cast(Any, self.lr_schedulers())
        for group, options in zip(optimizer.param_groups, self._options, strict=True):
            group |= options
        scheduler.base_lrs = [options["initial_lr"] for options in self._options]
        for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make the step's randomness a function of the step; sum its targets, and what callbacks
        flagged, over the ranks.
        """
        splits = self.trainer.accumulate_grad_batches
        micro = batch_idx % splits
        # Named by what is in it, a micro-batch draws the same on any rank.
        first = batch.samples[0].ref.position if batch.samples else -1
        group = () if self.model.sequence_group is None else (self.model.sequence_group.rank,)
        torch.manual_seed(_key(self.seed, self.global_step, first, *group))
        if micro == 0:
            flags = torch.tensor([flag() for flag in self.flags.values()], dtype=torch.int64)
            mine = [*batch.step_counts.values(), *flags.to(self.device, non_blocking=True)]
            sums = cast(Tensor, self.trainer.strategy.reduce(torch.stack(mine), reduce_op="sum"))
            units = list(batch.step_counts)
            # Ranks that share packs have counted the same.
            own = sums[: len(units)] // cast(Any, self.trainer).datamodule.ranks_per_pack
            self._step_counts = dict(zip(units, own, strict=True))
            self.agreed = dict(zip(self.flags, sums[len(units) :], strict=True))
            self._step_losses, self.step_samples, self._spike = {}, [], False

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The sum of the objectives, divided so that any split of a step gives the same gradients:
        the strategy averages over ranks, Lightning divides by the micro-batches.
        """
        splits = self.trainer.accumulate_grad_batches
        if batch_idx % splits == 0:
            for objective in self.objectives.values():
                cast(Objective, objective).begin_step(self.model, batch)
        batch = self.own_part(batch)
        output = self.model(batch)
        losses = self._losses(output, batch)
        shares = {
            name: self._weight(name) * loss.total / self._count(name).clamp(min=1)
            for name, loss in losses.items()
        }
        share = torch.stack(list(shares.values())).sum()
        for name, value in {"loss": share, **shares}.items():
            self._step_losses[name] = self._step_losses.get(name, 0.0) + value.detach().float()
        self.step_samples += batch.samples
        if (batch_idx + 1) % splits == 0:
            self._end_losses()
        # A loss that is not finite makes every gradient NaN, on all ranks: one check finds both.
        share = share * torch.where(share.detach().isfinite(), 1.0, torch.nan)
        loss = share * (self.trainer.world_size // self.copies) * splits + output.idle
        if not self.step_has_targets:  # it reaches what trains all the same
            loss = loss + 0.0 * output.hidden_states.sum()
        return {"loss": loss, "losses": {name: _detached(loss) for name, loss in losses.items()}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the weights as they are in a step without a target (at the end of the data, or of
        bad samples only) and in a spike. Refuse one whose gradients are not finite: they are the
        ranks' mean by now, so every rank refuses it.
        """
        if self.leaves_step_out:
            optimizer.zero_grad()  # momentum and decay would move them
            return
        if self.copies > 1:
            cast(Any, self.trainer.strategy).average_copies(optimizer)
        norm = total_norm(
            p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None
        )
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        skips = scaler is not None and scaler.get_scale() >= 1  # fp16 skips steps by itself
        if not (skips or torch.isfinite(norm)):
            self.refuse_step()
            optimizer.zero_grad()

    @property
    def copies(self) -> int:
        """How many ranks compute the same terms of the losses."""
        return int(getattr(self.trainer.strategy, "tensor_parallel", 1))

    @property
    def step_has_targets(self) -> bool:
        """Whether any rank has something to learn in this optimizer step."""
        return any(bool(self._count(name)) for name in self.objectives)

    @property
    def leaves_step_out(self) -> bool:
        """Whether the weights stay as they are in this optimizer step, as is known before the last
        of its backward passes: it has no targets, or its loss is a spike.
        """
        return self._spike or not self.step_has_targets

    def refuse_step(self) -> None:
        """Of a step whose gradients are not finite, on all ranks: raise, or return where the guard
        leaves it out.
        """
        losses = {name: float(value) for name, value in self._summed_losses().items()}
        why = (
            f"the gradients of optimizer step {self.global_step} are not finite (the losses are "
            f"{losses})"
        )
        if self.guard is None:
            raise FloatingPointError(why)
        self.guard.refuse(self, why)

    def _end_losses(self) -> None:
        """The losses of the step over the ranks: logged, and judged."""
        every = max(1, cast(Any, self.trainer).log_every_n_steps)
        due = (self.global_step + 1) % every == 0
        judged = self.guard is not None and self.guard.spike is not None
        if not (due or judged) or not self.step_has_targets:
            return
        found = self._summed_losses()
        if due:
            counts = {name: self._count(name) for name in self.objectives}
            report = {f"train/{n}": float(x) for n, x in found.items() if counts.get(n, 1)}
            for name, value in report.items():
                self.log(name, value, prog_bar=name == "train/loss", logger=False)
            # Not by Lightning, which would log the last value again in a step without targets.
            for logger in self.loggers:
                logger.log_metrics(report, step=self.global_step)
        if self.guard is not None and judged:
            self._spike = self.guard.judge(self, float(found["loss"]))

    def _summed_losses(self) -> dict[str, Tensor]:
        """Over the ranks; all of them must call it."""
        sums = torch.stack([*self._step_losses.values()])
        sums = cast(Tensor, self.trainer.strategy.reduce(sums, reduce_op="sum")) / self.copies
        return dict(zip(self._step_losses, sums, strict=True))

    def own_part(self, batch: Batch) -> Batch:
        """What this rank computes of a batch: all of it, where no others have the same."""
        group = self.model.sequence_group
        return batch if group is None else own_part(batch, group.rank, group.size)

    def _losses(self, output: Any, batch: Batch) -> dict[str, Loss]:
        return {name: loss(self.model, output, batch) for name, loss in self.objectives.items()}

    def _count(self, name: str) -> Tensor:
        """Terms of an objective in this step, on all ranks."""
        return self._step_counts[self._unit(name)]

    def _unit(self, name: str) -> str:
        return cast(Objective, self.objectives[name]).unit

    def _weight(self, name: str) -> float:
        return cast(Objective, self.objectives[name]).weight

    # ---- evaluation

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Losses of a batch; ``val/loss`` is their mean over the supervised tokens."""
        return self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """As validation, under ``test/``."""
        return self._evaluate(batch)

    def predict_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """For each sample, where it is from, and of each objective its loss and how many supervised
        tokens, or targets, it is summed over.
        """
        losses = self._losses(self.model(batch), batch)
        rows = []
        for i, sample in enumerate(batch.samples):
            row: dict[str, Any] = {"source": sample.ref.source, "shard": sample.shard}
            row |= {"key": sample.key, "index": sample.ref.index}
            for name, loss in losses.items():
                row[name] = float(loss.per_sample[i])
                terms = "tokens" if self._unit(name) == "tokens" else "targets"
                row[f"{name}_{terms}"] = int(loss.per_sample_count[i])
            rows.append(row)
        return rows

    def _evaluate(self, batch: Batch) -> Evaluated:
        batch = self.own_part(batch)
        output = self.model(batch)
        losses = self._losses(output, batch)
        for name, loss in losses.items():
            mean = cast(MeanMetric, self.means[name])
            mean.update(loss.total.detach().float() / loss.count.clamp(min=1), loss.count)
            cast(SumMetric, self.terms[name]).update(loss.count)
        return Evaluated(batch, losses, output.conditioning)

    def on_validation_epoch_end(self) -> None:
        """Log the losses of the validation."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """As validation, under ``test/``."""
        self._report("test")

    def _report(self, prefix: str) -> None:
        """Means over all ranks, and their weighted sum; of an objective without a term, nothing."""
        found = {}
        for name in self.objectives:
            mean, terms = cast(MeanMetric, self.means[name]), cast(SumMetric, self.terms[name])
            if not mean.update_called:  # there was no batch
                continue
            value, count = mean.compute(), terms.compute()
            mean.reset()
            terms.reset()
            if count:
                found[name] = self._weight(name) * value
                self.log(f"{prefix}/{name}", value)
        if found:
            self.log(f"{prefix}/loss", torch.stack([*found.values()]).sum())

    # ---- optimizer and checkpoints

    def configure_optimizers(self) -> Any:
        """One group a policy and part, the schedule by optimizer step."""
        optimizer = self.make_optimizer([{**group} for group in self.groups])
        scheduler = self.schedule(optimizer, self.trainer.max_steps)
        self._options = [
            {key: group[key] for key in RECIPE_OPTIONS if key in group}
            for group in optimizer.param_groups
        ]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what trains now or trained in an earlier stage."""
        keep_trained(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint holds this recipe's trained weights, and the optimizer's state
        in this recipe's order.
        """
        check_own(self, checkpoint)
        check_order(self, checkpoint)
        self.inherited = set(checkpoint["state_dict"]) - trained_names(self)

    def restore(self, path: str | Path) -> None:
        """Build the parts and load a checkpoint of this recipe, to use or evaluate them."""
        self.init_from = None  # what came from there is in the checkpoint
        self.compile_llm = False  # generating grows a cache: every step would be compiled anew
        self.configure_model()
        load_own(self, path)


def _detached(loss: Loss) -> Loss:
    return Loss(loss.total.detach(), loss.count, loss.per_sample, loss.per_sample_count)


def _key(*parts: int) -> int:
    """A seed from numbers, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
