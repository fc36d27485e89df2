"""Keeps the data stream's state with the training's: commits it when an optimizer step completes,
saves it in the checkpoint, restores it before loading starts, and ends the run with the data.

Lightning's own loader state is not used: it is one batch ahead of training, it is rank 0's alone,
and it is dropped where the number of steps was estimated first.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from mmfusion.data.datamodule import MultimodalData
from mmfusion.data.state import (
    BadSample,
    LaneState,
    LeftOut,
    SourceCounts,
    StepRecord,
    StreamState,
)
from mmfusion.data.stream import exhausted, make_order
from mmfusion.data.whole_file import write_whole
from mmfusion.types import Batch

logger = logging.getLogger(__name__)

_MIN_SAMPLES = (20, 100)
"""Samples to see before the share of bad ones can stop a run: the second number, or as many as the
source has, but not fewer than the first."""


class BadDataError(ValueError):
    """More samples than ``data.max_bad_fraction`` are unusable."""


class StreamStateCallback(L.Callback):
    """Commits, saves and restores the state of :class:`mmfusion.data.datamodule.MultimodalData`.

    Args:
        quarantine: file that lists every sample left out, one JSON object a line; relative to the
            run directory. Rank 0 writes it for all ranks when a checkpoint is saved and when
            training ends.
    """

    def __init__(self, quarantine: str = "quarantine.jsonl") -> None:
        self._quarantine = quarantine
        self._path = Path(quarantine)
        self._data: MultimodalData | None = None
        self._pending = _Pending()
        self._recent: deque[BadSample] = deque(maxlen=20)
        self._lengths: list[int | None] = []
        self._started = False
        self._last_step = 0
        self.left_out: list[LeftOut] = []
        """Packs that are left out, as rank 0 knows."""

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the state."""
        return "mmfusion.stream"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the data."""
        data = getattr(trainer, "datamodule", None)
        if stage != "fit" or not isinstance(data, MultimodalData):
            return
        self._data, data.managed, self._started = data, True, False
        self._path = Path(trainer.default_root_dir) / self._quarantine
        order = make_order(data.state.spec)
        self._lengths = [order.length(lane) for lane in range(data.state.spec.lanes)]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out what the run has left out."""
        if self._data is not None:
            self._data.leave_out(trainer.strategy.broadcast(self.left_out))

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint without our state; read it from any other."""
        if self._data is None:
            return
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        if saved is None:
            raise ValueError(
                "the checkpoint holds no state of the data stream, so the run cannot go on where "
                "it was; use model.init_from to start a new run from its weights."
            )
        if self._started:
            raise RuntimeError("the data stream was restored after loading had started")
        self._data.restore(StreamState.from_json(saved))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that model and data stand at the same step, and align Lightning's count of
        micro-batches, which accumulation counts from and which another number of ranks changes.
        """
        state = self._stream
        if trainer.global_step != state.step:
            raise RuntimeError(
                f"training stands at step {trainer.global_step}, the data stream at {state.step}; "
                "expected both from the same checkpoint."
            )
        loop = trainer.fit_loop.epoch_loop
        done = state.step * trainer.accumulate_grad_batches
        batches: Any = loop.batch_progress
        for progress in (batches.current, batches.total):  # validation is due by the total
            progress.ready = progress.started = progress.processed = done
            # Lightning itself completes the micro-batch in whose end hook it saved.
            progress.completed = done - loop.restarted_on_train_batch_end
        self._started, self._last_step = True, state.step
        if trainer.is_global_zero:
            self._drop_listed(state.step)
        self._stop_at_end(trainer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Commit the step that this micro-batch completed."""
        record: StepRecord | None = batch.stream
        stepped = trainer.global_step > self._last_step
        if stepped != (record is not None):
            raise RuntimeError(
                f"micro-batch {batch_idx} {'completed' if stepped else 'did not complete'} an "
                f"optimizer step, but is {'not ' if record is None else ''}the last of its step; "
                "trainer.accumulate_grad_batches does not match the data."
            )
        if record is None:
            return
        self._last_step = trainer.global_step
        self._stream.commit(record)
        self._pending.add(record)
        self._recent.extend(record.bad)
        if trainer.world_size == 1:
            self._check_bad(_rows(self._stream.counts))
        self._stop_at_end(trainer)
        every: int = getattr(trainer, "log_every_n_steps")  # noqa: B009 (set by a connector)
        if every and trainer.global_step % every == 0:
            rows = self._all_rows(trainer)
            self._log(pl_module, rows)
            self._check_bad(rows)

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks' lanes. Called on every rank when a checkpoint is saved."""
        if self._data is None:
            return {}
        self._gather()
        self._check_bad(_rows(self._stream.counts))
        return self._stream.to_json()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the list of bad samples up to date."""
        if self._data is None:
            return
        self._gather()
        counts = self._stream.counts.values()
        bad = sum(sum(source.bad.values()) for source in counts)
        if bad and not any(source.seen for source in counts):
            raise BadDataError(
                f"nothing was trained: all {bad} samples are unusable. They are listed in "
                f"{self._path}."
            )
        if bad:
            told = {source: dict(c.bad) for source, c in self._stream.counts.items() if c.bad}
            logger.warning("%d samples were left out (%s); see %s", bad, told, self._path)

    @property
    def _stream(self) -> StreamState:
        if self._data is None:
            raise ValueError(
                "StreamStateCallback needs trainer.fit(..., datamodule=MultimodalData)"
            )
        return self._data.state

    def _gather(self) -> None:
        """Bring what ranks committed since the last time into every rank's state; rank 0 lists the
        bad samples.
        """
        everyone = [self._pending]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            assert self._data is not None
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, self._pending)
            everyone = gathered[:: self._data.ranks_per_pack]  # those that share packs say the same
            own = dist.get_rank() // self._data.ranks_per_pack
            for other in (x for place, x in enumerate(everyone) if place != own):
                self._stream.absorb(other.lanes, other.counts)
        self._pending = _Pending()
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._list([entry for pending in everyone for entry in pending.bad])

    def _list(self, entries: list[tuple[int, BadSample]]) -> None:
        """Append to the quarantine file."""
        if not entries:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            for step, sample in sorted(entries, key=lambda entry: entry[0]):
                file.write(json.dumps({"step": step, **asdict(sample)}) + "\n")

    def _drop_listed(self, step: int) -> None:
        """Forget entries of steps that will be taken again, and a line that was cut short."""
        if not self._path.exists():
            return
        lines = self._path.read_bytes().splitlines(keepends=True)
        with write_whole(str(self._path)) as file:
            file.writelines(line for line in lines if line.endswith(b"\n") and _before(line, step))

    def _check_bad(self, rows: dict[str, list[int]]) -> None:
        """Stop where too many samples of a source, or of all, are bad. Called with the same counts
        on every rank, so that all of them stop.
        """
        assert self._data is not None
        sizes = {source.name: source.n for source in self._stream.spec.sources}
        few, enough = _MIN_SAMPLES
        whole = [sum(column) for column in zip(*rows.values(), strict=True)]
        for name, (seen, _, bad) in {**rows, "all sources": whole}.items():
            least = max(few, min(sizes.get(name, enough), enough))
            if seen + bad >= least and bad > self._data.max_bad_fraction * (seen + bad):
                break
        else:
            return
        self._gather()
        reasons = {source: c.bad for source, c in self._stream.counts.items() if c.bad}
        recent = "\n".join(map(str, self._recent))
        raise BadDataError(
            f"{name}: {bad} of {seen + bad} samples are unusable (so far {reasons}), at most "
            f"{self._data.max_bad_fraction:.3g} of them may be (data.max_bad_fraction). All are "
            f"listed in {self._path}, the last ones of this process are:\n{recent}"
        )

    def _stop_at_end(self, trainer: L.Trainer) -> None:
        """End the run on all ranks at the step after which no lane has anything left."""
        if None in self._lengths:
            return
        over = torch.tensor(exhausted(self._lengths, self._stream), dtype=torch.int32)
        over = over.to(trainer.strategy.root_device)
        if (trainer.strategy.reduce(over, reduce_op="sum") > 0).all():
            logger.info("the data are used up after step %d", self._stream.step)
            trainer.should_stop = True

    def _all_rows(self, trainer: L.Trainer) -> dict[str, list[int]]:
        """Counts of all ranks: what this one knows, and what the others added since."""
        known, pending = self._stream.counts, self._pending.counts
        mine = torch.tensor(
            list(_rows({n: pending.get(n, SourceCounts()) for n in known}).values())
        )
        # A copy: on a CPU it is summed in place.
        total = trainer.strategy.reduce(
            mine.to(trainer.strategy.root_device, copy=True), reduce_op="sum"
        )
        assert self._data is not None
        everyone = total.cpu() // self._data.ranks_per_pack
        all_of = torch.tensor(list(_rows(known).values())) + everyone - mine
        return dict(zip(known, all_of.tolist(), strict=True))

    def _log(self, pl_module: L.LightningModule, rows: dict[str, list[int]]) -> None:
        for name, row in rows.items():
            for what, count in zip(_COLUMNS, row, strict=True):
                pl_module.log(f"data/{name}/{what}", float(count), rank_zero_only=False)


_COLUMNS = ("samples", "tokens", "bad")


def _rows(counts: Mapping[str, SourceCounts]) -> dict[str, list[int]]:
    """The columns of each source."""
    return {name: [c.seen, c.tokens, sum(c.bad.values())] for name, c in counts.items()}


@dataclass
class _Pending:
    """What this rank committed since the ranks last exchanged their states."""

    lanes: dict[int, LaneState] = field(default_factory=dict)
    counts: dict[str, SourceCounts] = field(default_factory=dict)
    bad: list[tuple[int, BadSample]] = field(default_factory=list)

    def add(self, record: StepRecord) -> None:
        self.lanes.update(record.lanes)
        for source, counts in record.counts.items():
            self.counts.setdefault(source, SourceCounts()).add(counts)
        self.bad += [(record.step, sample) for sample in record.bad]


def _before(line: bytes, step: int) -> bool:
    """Whether a listed sample is of an earlier step. A line that cannot be read is left alone."""
    try:
        return int(json.loads(line)["step"]) < step
    except (ValueError, KeyError, TypeError):
        return True
