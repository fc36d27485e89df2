"""The global stream of packs: optimizer step t is G consecutive packs, pack q from lane q mod L.

Ranks and loader processes only divide a step among themselves, so step t holds the same packs for
any number of them. Every process can give any pack: it continues the pack's lane from the committed
state, which costs planning (text and media headers), never decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mmfusion.data.mixture import GlobalOrder
from mmfusion.data.order import FORMAT
from mmfusion.data.packing import LanePacker, Pack
from mmfusion.data.reader import Budget, Reader
from mmfusion.data.source import Source
from mmfusion.data.state import (
    BadSample,
    SourceCounts,
    SourceSpec,
    StepRecord,
    StreamSpec,
    StreamState,
)
from mmfusion.processing.processor import Processor
from mmfusion.types import EncodedSample

MAX_LANES = 1 << 20


def make_spec(
    sources: Mapping[str, Source],
    processor: Processor,
    *,
    seed: int,
    lanes: int,
    block: int,
    window: int,
    pack_tokens: int,
    pack_media: Mapping[str, int],
    epochs: float | None,
) -> StreamSpec:
    """What the stream is a function of; opens the sources' shards.

    Its window is at most a lane's part of an epoch of the source that is over first: a larger one
    would shuffle several epochs of a small source into the same step.
    """
    limits = {"lanes": lanes, "block": block, "window": window, "pack_tokens": pack_tokens}
    for name, value in {**limits, **pack_media}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if lanes > MAX_LANES:
        raise ValueError(f"lanes is {lanes}; at most {MAX_LANES} are kept, 64 are usual.")
    if unknown := sorted(set(pack_media) - set(processor.media)):
        raise ValueError(
            f"pack_media limits {unknown}, but the model's modalities are {sorted(processor.media)}"
        )
    specs = tuple(
        SourceSpec(name, source.shards.dataset_id, len(source), source.weight)
        for name, source in sources.items()
    )
    spec = StreamSpec(
        FORMAT, seed, lanes, block, window, pack_tokens, dict(sorted(pack_media.items())), epochs,
        processor.fingerprint(), specs,
    )  # fmt: skip
    return replace(spec, window=min(window, make_order(spec).lane_epoch))


def make_order(spec: StreamSpec) -> GlobalOrder:
    """The order of samples of a stream."""
    return GlobalOrder(
        [source.name for source in spec.sources],
        [source.n for source in spec.sources],
        [source.weight for source in spec.sources],
        spec.lanes,
        spec.block,
        spec.seed,
        spec.epochs,
    )


def packs_of_rank(first: int, count: int, lanes: int, rank: int, world: int) -> list[int]:
    """The packs of a rank among ``count`` from ``first``: a contiguous part of them by lane."""
    by_lane = sorted(range(first, first + count), key=lambda q: (q % lanes, q))
    return by_lane[rank * count // world : (rank + 1) * count // world]


@dataclass
class LocalStep:
    """One rank's part of a step: its packs, decoded, and what to commit."""

    packs: list[list[EncodedSample]]
    record: StepRecord


class Stream:
    """Gives packs and steps from a state on.

    Args:
        state: where to go on; copied, never changed.
        sources, processor: as the state's spec was made from.
    """

    def __init__(
        self, state: StreamState, sources: Mapping[str, Source], processor: Processor
    ) -> None:
        self.spec, self._start = state.spec, state
        self._order = make_order(self.spec)
        budget = Budget(self.spec.pack_tokens, self.spec.pack_media)
        self._reader = Reader(sources, processor, self.spec.seed, budget)
        self._lanes: dict[int, LanePacker] = {}

    def lane_length(self, lane: int) -> int | None:
        """Samples of a lane, None where it is endless."""
        return self._order.length(lane)

    def pack(self, q: int) -> Pack:
        """Pack q, planned. Packs of a lane must be asked for in order."""
        lane, number = q % self.spec.lanes, q // self.spec.lanes
        packer = self._packer(lane)
        assert packer.state.packs <= number, f"pack {q} of lane {lane} was given before"
        while packer.state.packs < number:
            packer.next()
        return packer.next()

    def local_step(
        self, step: int, first: int, count: int, rank: int = 0, world: int = 1
    ) -> LocalStep:
        """The part of ``rank`` of the ``count`` packs from ``first``, decoded."""
        counts: dict[str, SourceCounts] = {}
        bad: list[BadSample] = []
        packs, lanes = [], {}
        for q in packs_of_rank(first, count, self.spec.lanes, rank, world):
            pack = self.pack(q)
            samples = [self._reader.finish(item) for item in pack.items]
            good = [sample for sample in samples if isinstance(sample, EncodedSample)]
            bad += pack.bad + [sample for sample in samples if isinstance(sample, BadSample)]
            for sample in good:
                assert sample.ref is not None
                one = SourceCounts(1, len(sample.planned))
                counts.setdefault(sample.ref.source, SourceCounts()).add(one)
            packs.append(good)
            lane = q % self.spec.lanes
            lanes[lane] = self._packer(lane).state
        for left_out in bad:
            one = SourceCounts(bad={left_out.reason: 1})
            counts.setdefault(left_out.source, SourceCounts()).add(one)
        return LocalStep(packs, StepRecord(step, first, first + count, lanes, counts, bad))

    def _packer(self, lane: int) -> LanePacker:
        if lane not in self._lanes:
            self._lanes[lane] = LanePacker(
                lane,
                self.spec.seed,
                self.lane_length(lane),
                self.spec.window,
                self._reader.budget.total,
                lambda times: [self._reader.plan(ref) for ref in self._order(lane, times)],
                self._start.lanes[lane],
            )
        return self._lanes[lane]


def exhausted(lengths: Sequence[int | None], state: StreamState) -> list[bool]:
    """Which lanes of a state have nothing left."""
    return [lane.exhausted(n) for lane, n in zip(state.lanes, lengths, strict=True)]
