"""What a validation or a test says beyond ``val/loss``, which the module logs itself.

- ``val/<objective>/<source>``: loss per supervised token of each source;
- ``val/shuffled_gap/<modality>``: how much worse the first objective is, per token, where every
  sample sees the media of another sample of its source with another answer (near 0: the model does
  not look). It flatters: the fair baseline is a model trained without media;
- ``val/exact_match/<source>`` and ``val/f1/<source>``, in percent (SQuAD's, by torchmetrics), of
  greedy answers to some samples of each source of conversations, where the true answer has words;
- ``val/emission/{precision,recall,f1}/<modality>`` of the same answers: media when they should hold
  some, and only then; of ``speech``: said aloud when they should be;
- what the conditioning of the true answers' media is worth (:mod:`.media_health`):
  ``val/cosine/<modality>``, ``val/retrieval@{1,5}/<modality>`` among ``val/captions/<modality>``,
  ``val/denoising/<modality>/{ours,caption,empty}`` and ``val/denoising_gain/<modality>``;
- ``val/judge/<modality>/<figure>`` of media that were made;
- a W&B table ``val/samples`` and a page in the run directory (:mod:`.sample_pages`): media, prompt,
  answer and truth, as words and as media.

In a test the names begin with ``test/``. Sums are over all ranks. The samples asked about, and the
noise of what is made, depend on the source alone, not on ranks or steps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import lightning as L
import torch

from mmfusion.data.datamodule import data_of
from mmfusion.metrics.judges.base import Judge
from mmfusion.metrics.shuffled_media import shuffle_media
from mmfusion.metrics.token_loss import TokenLoss
from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.models.generators.base import PARTS, Sampling
from mmfusion.objectives.base import Loss
from mmfusion.training.callbacks.answering import Answering, Asking, precision
from mmfusion.training.callbacks.media_health import MediaHealth
from mmfusion.training.callbacks.sample_pages import SamplePages
from mmfusion.training.callbacks.table import log_table
from mmfusion.training.module import Evaluated, MultimodalModule
from mmfusion.types import Batch

log = logging.getLogger(__name__)


class Validation(L.Callback):
    """Losses by source, the shuffled-media gap, answers.

    Args:
        shuffled_gap: measure it; one more forward pass for each modality.
        generate_samples: samples of each source of conversations that are answered; 0 is none.
        table_samples: samples of every source shown in the W&B table and on the page; 0 is none.
        max_new_tokens: longest answer, not counting the rest of a run of signal tokens.
        prompts_per_batch: samples answered together.
        media_health: measure the conditioning of targets, where the objectives or the tuning have
            the parts of the generator loaded that this takes; three more passes of the denoiser.
        media_samples: samples of each source of conversations whose answers' media are made, to be
            shown and judged. Above 0 every part of the generators is loaded.
        sampling: how they are made.
        judges: for each modality, what judges the media that are made.

    Attributes:
        pages: where answered samples are shown beside W&B; the command sets it, on rank 0.
    """

    def __init__(
        self,
        shuffled_gap: bool = True,
        generate_samples: int = 32,
        table_samples: int = 4,
        max_new_tokens: int = 24,
        prompts_per_batch: int = 16,
        media_health: bool = True,
        media_samples: int = 0,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        judges: dict[str, Judge] | None = None,
    ) -> None:
        for name, value, lowest in (
            ("generate_samples", generate_samples, 0),
            ("table_samples", table_samples, 0),
            ("max_new_tokens", max_new_tokens, 1),
            ("prompts_per_batch", prompts_per_batch, 1),
            ("media_samples", media_samples, 0),
        ):
            if value < lowest:
                raise ValueError(f"validation.{name} is {value}; expected {lowest} or more.")
        if judges and not media_samples:
            raise ValueError(
                f"validation.judges judge media of {sorted(judges)}, but none are made; set "
                "validation.media_samples, or leave the judges out."
            )
        for modality, judge in (judges or {}).items():
            if judge.modality not in (None, modality):
                raise ValueError(
                    f"validation.judges.{modality}: {type(judge).__name__} judges media of the "
                    f"modality {judge.modality}, as it is set up here; expected {modality}."
                )
        if not isinstance(sampling.seed, int):
            raise ValueError(
                f"validation.sampling.seed is {sampling.seed}; expected one number, from which "
                "each sample has its own."
            )
        self.shuffled_gap = shuffled_gap
        self.media_health = media_health
        self.judges = judges or {}
        self.pages: SamplePages | None = None
        self.asking = Asking(
            generate_samples,
            table_samples,
            media_samples,
            max_new_tokens,
            prompts_per_batch,
            sampling,
        )
        self._rng: torch.Tensor | None = None
        self._warned = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before the parts are built: say what making media takes; load the judges."""
        if not self.asking.media_samples or not data_of(trainer).val_sources:
            return
        model = _module(pl_module).model
        self.need(model)
        with torch.random.fork_rng():
            for judge in self.judges.values():
                judge.build()

    def need(self, model: AnyToAnyModel) -> None:
        """Have the parts of the generators that making media takes.

        Raises:
            ValueError: where media cannot be made so, or not be judged.
        """
        if not self.asking.media_samples:
            return
        if odd := sorted(set(self.judges) - set(model.generators)):
            raise ValueError(
                f"validation.judges judge {odd}; the model makes {sorted(model.generators)}."
            )
        for modality in model.generators:
            generator = model.generator(modality)
            try:
                generator.check(self.asking.sampling)
                generator.check_drawn(model.given(modality))
            except ValueError as error:
                raise ValueError(
                    f"validation.media_samples is {self.asking.media_samples}, but the generator "
                    f"of {modality} cannot make media as the recipe says: {error}"
                ) from error
            model.need(modality, PARTS)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fresh sums."""
        module, sources = _module(pl_module), list(data_of(trainer).val_sources)
        self._rng = torch.get_rng_state()
        self._losses = {name: TokenLoss(sources).to(module.device) for name in module.objectives}
        self._health = MediaHealth(trainer, module)
        self._right = {
            modality: TokenLoss(sources).to(module.device) for modality in module.model.encoders
        }
        self._wrong = {
            modality: TokenLoss(sources).to(module.device) for modality in module.model.encoders
        }

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch."""
        evaluated = cast(Evaluated, outputs)
        losses = evaluated.losses
        for name, loss in losses.items():
            self._losses[name].update(loss, batch.samples)
        if trainer.sanity_checking:
            return
        if self.media_health:
            with precision(trainer):
                self._health.add(evaluated.batch, evaluated.conditioning)
        if self.shuffled_gap:
            first = next(iter(losses.values()))
            self._add_gap(trainer, _module(pl_module), first, batch)

    def _add_gap(
        self, trainer: L.Trainer, module: MultimodalModule, right: Loss, batch: Batch
    ) -> None:
        objective = next(iter(module.objectives.values()))
        for modality in module.model.encoders:
            shuffled, chosen = shuffle_media(batch, modality)
            # Several ranks must run the same graph, also where one has nothing to exchange.
            if not chosen.any() and trainer.world_size == 1:
                continue
            shuffled = module.own_part(shuffled)
            with torch.no_grad(), precision(trainer):
                wrong = objective(module.model, module.model(shuffled), shuffled)
            self._right[modality].update(right, batch.samples, chosen)
            self._wrong[modality].update(wrong, batch.samples, chosen)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the figures, answer samples, put back the generator."""
        if trainer.sanity_checking:
            return
        figures = self._figures(_stage(trainer))
        self._warn_of_gaps(figures, trainer)
        if self.media_health:
            with precision(trainer):
                health = self._health.figures()
            figures |= {f"{_stage(trainer)}/{name}": value for name, value in health.items()}
        figures |= self._answers(trainer, _module(pl_module))
        pl_module.log_dict(figures, sync_dist=trainer.world_size > 1)
        if self._rng is not None:
            torch.set_rng_state(self._rng)

    # A test is a validation under another name.
    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _figures(self, stage: str) -> dict[str, float]:
        figures = {
            f"{stage}/{name}/{source}": value
            for name, metric in self._losses.items()
            if metric.update_called
            for source, value in metric.compute().items()
            if source
        }
        for modality, metric in self._wrong.items():
            if not metric.update_called:
                continue
            right = self._right[modality].compute()
            for source, wrong in metric.compute().items():
                key = f"{stage}/shuffled_gap/{modality}/{source}".rstrip("/")
                figures[key] = wrong - right[source]
        return figures

    def _warn_of_gaps(self, figures: Mapping[str, float], trainer: L.Trainer) -> None:
        """Once, of modalities whose media could not be exchanged."""
        key = f"{_stage(trainer)}/shuffled_gap/"
        lacking = [m for m in self._wrong if key + m not in figures]
        if self.shuffled_gap and lacking and not self._warned:
            self._warned = True
            log.warning(
                "no %s for %s: no validation batch held two samples of one source with such media "
                "and other answers; raise data.pack_tokens, or add such samples",
                key[:-1],
                ", ".join(lacking),
            )

    def _answers(self, trainer: L.Trainer, module: MultimodalModule) -> dict[str, float]:
        """Answer samples of each source, and show some."""
        stage, makes = _stage(trainer), list(module.model.generators)
        answering = Answering(trainer, module, self.asking, self.judges)
        figures = {f"{stage}/{name}": value for name, value in answering.figures().items()}
        rows = answering.rows()
        if trainer.is_global_zero and rows:
            log_table(trainer, f"{stage}/samples", rows, list(module.model.encoders), makes)
            if self.pages is not None:
                self.pages.write(rows, trainer.global_step)
        return figures


def _module(module: L.LightningModule) -> MultimodalModule:
    return cast(MultimodalModule, module)


def _stage(trainer: L.Trainer) -> str:
    return "test" if trainer.testing else "val"
