"""What a validation or a test says beyond ``val/loss``, which the module logs itself.

- ``val/<objective>/<source>``: loss per supervised token of each source;
- ``val/shuffled_gap/<modality>``: how much worse the first objective is, per token, where every
  sample sees the media of another sample of its source with another answer (near 0: the model does
  not look). It flatters: the fair baseline is a model trained without media;
- ``val/exact_match/<source>`` and ``val/f1/<source>``, in percent (SQuAD's, by torchmetrics), of
  greedy answers to some samples of each source of conversations;
- a W&B table ``val/samples`` of media, prompt, answer and truth.

In a test the names begin with ``test/``. Sums are over all ranks. The samples asked about depend on
the source alone, not on ranks or steps.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import lightning as L
import torch
from torchmetrics.text import SQuAD

from mmfusion.data.collate import collate
from mmfusion.data.datamodule import MultimodalData
from mmfusion.data.packing import Item
from mmfusion.data.reader import Budget, Reader
from mmfusion.data.source import Source
from mmfusion.data.validation import spread
from mmfusion.metrics.answers import Question, as_question
from mmfusion.metrics.shuffled_media import shuffle_media
from mmfusion.metrics.token_loss import TokenLoss
from mmfusion.models.generation import generate
from mmfusion.objectives.base import Loss
from mmfusion.training.callbacks.table import Answered, log_table
from mmfusion.training.module import MultimodalModule
from mmfusion.types import Batch, DataError, EncodedSample, SampleRef

log = logging.getLogger(__name__)


class Validation(L.Callback):
    """Losses by source, the shuffled-media gap, answers.

    Args:
        shuffled_gap: measure it; one more forward pass for each modality.
        generate_samples: samples of each source of conversations that are answered; 0 is none.
        table_samples: samples of every source shown in the W&B table; 0 is no table.
        max_new_tokens: longest answer.
        prompts_per_batch: samples answered together.
    """

    def __init__(
        self,
        shuffled_gap: bool = True,
        generate_samples: int = 32,
        table_samples: int = 4,
        max_new_tokens: int = 24,
        prompts_per_batch: int = 16,
    ) -> None:
        for name, value, lowest in (
            ("generate_samples", generate_samples, 0),
            ("table_samples", table_samples, 0),
            ("max_new_tokens", max_new_tokens, 1),
            ("prompts_per_batch", prompts_per_batch, 1),
        ):
            if value < lowest:
                raise ValueError(f"validation.{name} is {value}; expected {lowest} or more.")
        self.shuffled_gap = shuffled_gap
        self.generate_samples = generate_samples
        self.table_samples = table_samples
        self.max_new_tokens = max_new_tokens
        self.prompts_per_batch = prompts_per_batch
        self._rng: torch.Tensor | None = None
        self._warned = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fresh sums."""
        module, sources = _module(pl_module), list(_data(trainer).val_sources)
        self._rng = torch.get_rng_state()
        self._losses = {name: TokenLoss(sources).to(module.device) for name in module.objectives}
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
        losses = cast("dict[str, Loss]", outputs)
        for name, loss in losses.items():
            self._losses[name].update(loss, batch.samples)
        if self.shuffled_gap and not trainer.sanity_checking:
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
            with torch.no_grad(), _precision(trainer):
                wrong = objective(module.model, module.model(shuffled), shuffled)
            self._right[modality].update(right, batch.samples, chosen)
            self._wrong[modality].update(wrong, batch.samples, chosen)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the figures, answer samples, put back the generator."""
        if trainer.sanity_checking:
            return
        figures = self._figures(_stage(trainer))
        self._warn_of_gaps(figures, trainer)
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
        """Answer this rank's share of the chosen samples of each source."""
        figures: dict[str, float] = {}
        rows: list[Answered] = []
        for name, source in _data(trainer).val_sources.items():
            chat = _is_chat(source)
            count = max(self.generate_samples if chat else 0, self.table_samples)
            chosen = spread(len(source), count)[trainer.global_rank :: trainer.world_size]
            metric = SQuAD().to(module.device)
            for group in _chunks(self._questions(trainer, name, chosen), self.prompts_per_batch):
                answers = self._generate(trainer, module, [question for _, question in group])
                for (ref, question), answer in zip(group, answers, strict=True):
                    key = f"{name}/{ref.index}"
                    target = {"answers": {"answer_start": [0], "text": [question.truth]}, "id": key}
                    metric.update({"prediction_text": answer, "id": key}, target)
                    if sum(row.source == name for row in rows) < self.table_samples:
                        media = tuple(source[ref.index].media)
                        rows.append(Answered(name, media, question.text, answer, question.truth))
            if chat and self.generate_samples and (chosen or trainer.world_size > 1):
                scores = metric.compute()
                figures[f"{_stage(trainer)}/exact_match/{name}"] = float(scores["exact_match"])
                figures[f"{_stage(trainer)}/f1/{name}"] = float(scores["f1"])
        if trainer.is_global_zero and rows:
            log_table(trainer, f"{_stage(trainer)}/samples", rows, list(module.model.encoders))
        return figures

    def _questions(
        self, trainer: L.Trainer, name: str, indices: Sequence[int]
    ) -> Iterator[tuple[SampleRef, Question]]:
        data, processor = _data(trainer), _processor(trainer)
        reader = Reader(data.val_sources, processor, 0, Budget(data.pack_tokens, data.pack_media))
        for index in indices:
            ref = SampleRef(name, 0, index)
            item = reader.plan(ref)
            sample = reader.finish(item) if isinstance(item, Item) else item
            if isinstance(sample, EncodedSample):  # bad ones are reported with the losses
                yield ref, as_question(sample, processor.tokenizer)

    def _generate(
        self, trainer: L.Trainer, module: MultimodalModule, questions: Sequence[Question]
    ) -> list[str]:
        processor = _processor(trainer)
        prompts = collate([question.prompt for question in questions], processor)
        with _precision(trainer):
            ids = generate(
                module.model,
                prompts.to(module.device),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
            )
        answers = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [answer.strip() for answer in answers]


def _module(module: L.LightningModule) -> MultimodalModule:
    return cast(MultimodalModule, module)


def _stage(trainer: L.Trainer) -> str:
    return "test" if trainer.testing else "val"


def _data(trainer: L.Trainer) -> MultimodalData:
    return cast(MultimodalData, trainer.datamodule)  # type: ignore[attr-defined]


def _processor(trainer: L.Trainer) -> Any:
    return _data(trainer).processor


def _is_chat(source: Source) -> bool:
    """Whether a source holds conversations: its first sample that can be read tells."""
    for index in range(len(source)):
        try:
            return source[index].format == "chat"
        except DataError:
            continue
    return False


def _precision(trainer: L.Trainer) -> AbstractContextManager:
    return trainer.precision_plugin.forward_context()


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
