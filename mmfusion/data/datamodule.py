"""The `data:` section of a recipe: sources in, batches out.

The training stream stands at ``state``, which is changed by whoever commits completed optimizer
steps (:class:`mmfusion.training.callbacks.stream_state.StreamStateCallback`), never by loading.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L

from mmfusion.data.index import ShardError
from mmfusion.data.loader import Division, FixedLoader, TrainLoader
from mmfusion.data.reader import Budget
from mmfusion.data.source import Source
from mmfusion.data.state import LeftOut, StreamState
from mmfusion.data.stream import make_spec
from mmfusion.data.validation import ValidationBatches
from mmfusion.data.workers import Workers
from mmfusion.processing.processor import Processor

logger = logging.getLogger(__name__)

MAX_COUNT = 1 << 20


class MultimodalData(L.LightningDataModule):
    """Mixes sources by weight, packs their samples and deals the packs to ranks and micro-batches.

    The samples of every optimizer step follow from these arguments alone, not from ranks,
    micro-batches or loader processes.

    Args:
        sources: training sources by name.
        val_sources: validation sources by name; also used by test and predict.
        pack_tokens: most tokens of a pack; a longer sample is left out and counted.
        pack_media: most encoder features of a pack, by modality; modalities that are not named
            are limited by their tokens alone.
        packs_per_step: packs of an optimizer step over all ranks (the global batch).
        packs_per_micro_batch: packs of one forward pass of one rank.
        lanes: independent orders the samples are dealt to. More ranks than lanes in a step read and
            plan some samples twice; best is a multiple of the ranks that divides or is divided by
            packs_per_step. For a small source and few epochs take as many as packs_per_step.
        window: samples of a lane that are packed together; at most the lane's part of an epoch of
            the source that is over first.
        block: contiguous samples kept near one another for reading.
        seed: of the order and of every sample's random numbers.
        num_workers: loader processes of a rank; 0 loads in the main process.
        pad_rows: one padded row a sample instead of packs end to end (a baseline to measure with).
        epochs: end after each sample was seen this often; None goes on without end, mixing by
            weight.
        max_bad_fraction: most samples that may be unusable before the run stops.
        val_limit: validation samples of each source, evenly spread; None takes all.
        worker_start: how loader processes start: fork, spawn or forkserver; None is the platform's.
        features: folder that `mmfusion data encode` made of this recipe: what frozen parts give is
            read from there, and these parts are not built.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        val_sources: dict[str, Source] | None = None,
        pack_tokens: int = 2048,
        pack_media: dict[str, int] | None = None,
        packs_per_step: int = 8,
        packs_per_micro_batch: int = 1,
        lanes: int = 64,
        window: int = 256,
        block: int = 256,
        seed: int = 0,
        num_workers: int = 1,
        pad_rows: bool = False,
        epochs: float | None = None,
        max_bad_fraction: float = 0.05,
        val_limit: int | None = None,
        worker_start: str | None = None,
        features: str | None = None,
    ) -> None:
        super().__init__()
        counts = {
            "packs_per_step": packs_per_step, "packs_per_micro_batch": packs_per_micro_batch,
            "val_limit": 1 if val_limit is None else val_limit,
        }  # fmt: skip
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}")
            if value > MAX_COUNT:
                raise ValueError(f"data.{name} must be at most {MAX_COUNT}, got {value}")
        if num_workers < 0 or not 0 <= max_bad_fraction <= 1:
            raise ValueError(
                f"data.num_workers is {num_workers}, expected 0 or more; data.max_bad_fraction is "
                f"{max_bad_fraction}, expected 0 to 1."
            )
        if not sources:
            raise ValueError("data.sources is empty; name at least one source.")
        self.sources, self.val_sources = sources, val_sources or {}
        self.pack_tokens, self.pack_media = pack_tokens, pack_media or {}
        self.packs_per_step, self.packs_per_micro_batch = packs_per_step, packs_per_micro_batch
        self.lanes, self.window, self.block, self.seed = lanes, window, block, seed
        self.pad_rows, self.epochs, self.val_limit = pad_rows, epochs, val_limit
        self.max_bad_fraction = max_bad_fraction
        self.workers = Workers(num_workers, worker_start)
        self.features = features
        self.processor: Processor | None = None
        self.managed = False
        """Whether a callback commits the steps of this module's stream."""
        self.ranks_per_pack = 1
        """Neighbouring ranks that are given the same packs."""
        self._state: StreamState | None = None
        self._left_out: Sequence[LeftOut] = ()
        self._val: FixedLoader | None = None

    def open_shards(self) -> None:
        """Open the shards of every source that is drawn from.

        Raises:
            ShardError: naming the recipe's key.
        """
        for section, sources in (("sources", self.sources), ("val_sources", self.val_sources)):
            for name, source in sources.items():
                try:
                    _ = source.weight and source.shards
                except ShardError as error:
                    raise ShardError(f"data.{section}.{name}.shards: {error}") from error

    def attach(self, processor: Processor) -> None:
        """Set the processor by hand, where no trainer does."""
        self.processor = processor
        self._state = self._val = None

    def setup(self, stage: str) -> None:
        """Take the model's processor."""
        if self.processor is None:
            module: Any = self._trainer.lightning_module
            self.attach(module.model.processor())

    @property
    def state(self) -> StreamState:
        """Where the training stream stands: after the last committed step."""
        if self._state is None:
            spec = make_spec(
                self.sources,
                self._ready_processor,
                seed=self.seed,
                lanes=self.lanes,
                block=self.block,
                window=self.window,
                pack_tokens=self.pack_tokens,
                pack_media=self.pack_media,
                epochs=self.epochs,
            )
            self._state = StreamState.start(spec)
        return self._state

    def restore(self, saved: StreamState) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: naming every difference, where it was saved by another stream.
        """
        spec = self.state.spec
        if differences := spec.differences(saved.spec):
            raise ValueError(
                "the data of this recipe are not those of the checkpoint, so the run cannot go on "
                "exactly:\n  " + "\n  ".join(differences) + "\nRestore the old values, or start a "
                "new run from the checkpoint's weights with model.init_from."
            )
        state = self.state
        state.step, state.packs = saved.step, saved.packs
        state.counts, state.lanes = saved.counts, saved.lanes
        state.left_out = saved.left_out
        self.leave_out(self._left_out)

    def leave_out(self, known: Sequence[LeftOut]) -> None:
        """Leave these packs out, from here on and after a :meth:`restore`."""
        self._left_out = known
        for other in self.state.leave_out(known, self.packs_per_step):
            logger.warning("not left out, as it is not of this history: %s", other)

    def division(self, rank: int, world: int) -> Division:
        """How a step is divided over ranks and micro-batches.

        Raises:
            ValueError: where the ranks are no whole number of groups that share packs.
        """
        size = self.ranks_per_pack
        if world % size:
            raise ValueError(
                f"{world} processes cannot share packs in groups of {size} (sequence_parallel); "
                f"start a multiple of {size}."
            )
        return Division(
            self.packs_per_step, self.packs_per_micro_batch, rank // size, world // size
        )

    def micro_batches_per_step(self, world_size: int) -> int:
        """Lightning's ``accumulate_grad_batches``."""
        return self.division(0, world_size).micro_batches

    def train_dataloader(self) -> TrainLoader:
        """Micro-batches from the committed state on."""
        rank, world = 0, 1
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            self._check_trainer(world)
        return TrainLoader(
            self.state,
            self.sources,
            self._ready_processor,
            self.division(rank, world),
            self.workers,
            self.pad_rows,
        )

    def val_dataloader(self) -> FixedLoader | list[Any]:
        """The same batches in every pass; none without ``val_sources``."""
        if not self.val_sources:
            return []
        if self._val is None:
            rank, world = 0, 1
            if self.trainer is not None:
                rank, world = self.trainer.global_rank, self.trainer.world_size
            division = self.division(rank, world)
            batches = ValidationBatches(
                self.val_sources,
                self._ready_processor,
                self.val_limit,
                Budget(self.pack_tokens, self.pack_media),
                division.rank,
                division.world,
                self.pad_rows,
            )
            self._val = FixedLoader(batches, self.workers)
        return self._val

    def test_dataloader(self) -> FixedLoader | list[Any]:
        """Those of validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> FixedLoader | list[Any]:
        """Those of validation."""
        return self.val_dataloader()

    @property
    def _ready_processor(self) -> Processor:
        if self.processor is None:
            raise ValueError(
                "the data have no processor yet: give them to a Trainer with the model, or call "
                "data.attach(model.processor())."
            )
        return self.processor

    @property
    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise ValueError("no trainer is attached; call data.attach(processor) instead.")
        return self.trainer

    def _check_trainer(self, world: int) -> None:
        if not self.managed:
            raise ValueError(
                "no callback commits the steps of the data stream, so the run could not be "
                "resumed; add StreamStateCallback to trainer.callbacks."
            )
        expected = self.micro_batches_per_step(world)
        if (got := self._trainer.accumulate_grad_batches) != expected:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {got}, expected {expected}: a step of "
                f"{self.packs_per_step} packs on {world} ranks, {self.packs_per_micro_batch} packs "
                "in a micro-batch. Leave it to the command line, or set it to that."
            )


def data_of(trainer: L.Trainer) -> MultimodalData:
    """The data that a trainer was given."""
    data = getattr(trainer, "datamodule", None)
    assert isinstance(data, MultimodalData), data
    return data
