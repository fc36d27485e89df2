"""The state of the stream: what identifies it, where it stands, and what a step adds.

All of it is plain data (JSON), a few kilobytes, with nothing per rank or per loader process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class LaneState:
    """Where a lane stands.

    Attributes:
        packs: packs it has given.
        cursor: lane time at which its current window starts.
        emitted: packs given from that window.
        carry: lane times carried into that window from before.
    """

    packs: int = 0
    cursor: int = 0
    emitted: int = 0
    carry: tuple[int, ...] = ()

    def exhausted(self, length: int | None) -> bool:
        """Whether a lane of this many samples (None: endless) has nothing left."""
        return length is not None and self.cursor >= length and not self.carry


@dataclass(frozen=True)
class BadSample:
    """A sample that was left out, as the quarantine file lists it."""

    source: str
    epoch: int
    index: int
    shard: str
    key: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"  {self.source} {self.shard} {self.key}: {self.reason}: {self.message}"


@dataclass
class SourceCounts:
    """What was seen of a source: samples and tokens trained on, and samples left out by reason."""

    seen: int = 0
    tokens: int = 0
    bad: dict[str, int] = field(default_factory=dict)

    def add(self, other: SourceCounts) -> None:
        """Add another count to this one."""
        self.seen += other.seen
        self.tokens += other.tokens
        for reason, count in other.bad.items():
            self.bad[reason] = self.bad.get(reason, 0) + count


@dataclass(frozen=True)
class SourceSpec:
    """A source, as far as the order depends on it."""

    name: str
    dataset_id: str
    n: int
    weight: float


@dataclass(frozen=True)
class StreamSpec:
    """All the stream is a function of. A run may only go on with the same one.

    ``window`` is the one in effect, see :func:`mmfusion.data.stream.make_spec`.
    """

    version: int
    seed: int
    lanes: int
    block: int
    window: int
    pack_tokens: int
    pack_media: dict[str, int]
    epochs: float | None
    processor: str
    sources: tuple[SourceSpec, ...]

    def differences(self, saved: StreamSpec) -> list[str]:
        """One line for every difference to a saved one."""
        lines = [
            f"{f.name}: now {getattr(self, f.name)!r}, saved {getattr(saved, f.name)!r}"
            for f in fields(self)
            if f.name != "sources" and getattr(self, f.name) != getattr(saved, f.name)
        ]
        now = {source.name: source for source in self.sources}
        old = {source.name: source for source in saved.sources}
        lines += [f"source {name!r}: not in the saved run" for name in now if name not in old]
        lines += [f"source {name!r}: only in the saved run" for name in old if name not in now]
        if set(now) == set(old) and list(now) != list(old):
            lines.append(f"order of sources: now {list(now)}, saved {list(old)}")
        for name in now:
            for f in fields(SourceSpec) if name in old else ():
                a, b = getattr(now[name], f.name), getattr(old[name], f.name)
                if a != b:
                    lines.append(f"source {name!r} {f.name}: now {a!r}, saved {b!r}")
        return lines


@dataclass(frozen=True)
class LeftOut:
    """Packs that no step trains on: the run went back to the beginning of a step, and on behind
    them.

    Attributes:
        step: that begins behind them.
        until: the step in which they ended before, because of which the run went back.
        first_pack, end_pack: the packs q.
        why: what was wrong with that step.
    """

    step: int
    until: int
    first_pack: int
    end_pack: int
    why: str


@dataclass
class StreamState:
    """Where the stream stands after ``step`` completed optimizer steps.

    Attributes:
        packs: q, packs over all lanes that were given so far, or left out.
        counts: by source.
        lanes: by lane number; those of packs left out are not gone through yet.
        left_out: packs that are left out before this step and after it, in order.
    """

    spec: StreamSpec
    step: int
    packs: int
    counts: dict[str, SourceCounts]
    lanes: list[LaneState]
    left_out: tuple[LeftOut, ...] = ()

    @classmethod
    def start(cls, spec: StreamSpec) -> StreamState:
        """The state before the first step."""
        counts = {source.name: SourceCounts() for source in spec.sources}
        return cls(spec, 0, 0, counts, [LaneState() for _ in range(spec.lanes)])

    def commit(self, record: StepRecord) -> None:
        """Add a completed step.

        Raises:
            RuntimeError: where the record does not continue this state.
        """
        if (record.step, record.first_pack) != (self.step, self.packs):
            raise RuntimeError(
                f"the batch belongs to step {record.step} (pack {record.first_pack}), expected "
                f"step {self.step} (pack {self.packs}): the loader and the restored state "
                "disagree, so samples would be lost or repeated. Restore before the loader starts."
            )
        self.packs = record.end_pack + self._left_out_in(self.step, record.step + 1)
        self.step = record.step + 1
        self.absorb(record.lanes, record.counts)

    def first_pack(self, step: int, packs_per_step: int) -> int:
        """The pack that a step begins with, this one or a later one."""
        between = self._left_out_in(self.step, step)
        return self.packs + (step - self.step) * packs_per_step + between

    def leave_out(self, known: Iterable[LeftOut], packs_per_step: int) -> list[LeftOut]:
        """Leave out packs of this step and of later ones as well.

        Args:
            known: all that were left out of the run, in order; what this state went past is passed
                over.
            packs_per_step: of the steps from this one on.

        Returns:
            Those that do not follow this state: it is of another history, in which the step they
            are left out before begins with another pack.
        """
        others = []
        for found in known:
            if found in self.left_out:
                continue
            ahead = found.step >= self.step
            if not ahead or self.first_pack(found.step, packs_per_step) != found.first_pack:
                others.append(found)
                continue
            self.left_out += (found,)
            if found.step == self.step:
                self.packs = found.end_pack
        return others

    def _left_out_in(self, after: int, step: int) -> int:
        """Packs left out before the steps behind one, to another."""
        return sum(x.end_pack - x.first_pack for x in self.left_out if after < x.step <= step)

    def absorb(self, lanes: Mapping[int, LaneState], counts: Mapping[str, SourceCounts]) -> None:
        """Add lanes and counts of a rank. Of a lane that several ranks took packs from, the
        furthest state is the true one.
        """
        for lane, state in lanes.items():
            if state.packs > self.lanes[lane].packs:
                self.lanes[lane] = state
        for source, more in counts.items():
            self.counts[source].add(more)

    def to_json(self) -> dict[str, Any]:
        """Plain data: dicts, lists, numbers and strings. What is left out later on is not of this
        state, but of the run.
        """
        past = tuple(x for x in self.left_out if x.step <= self.step)
        return _plain(asdict(replace(self, left_out=past)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StreamState:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: for anything else.
        """
        try:
            spec = dict(data["spec"])
            spec["sources"] = tuple(SourceSpec(**source) for source in spec["sources"])
            return cls(
                spec=StreamSpec(**spec),
                step=data["step"],
                packs=data["packs"],
                counts={
                    name: SourceCounts(c["seen"], c["tokens"], dict(c["bad"]))
                    for name, c in data["counts"].items()
                },
                lanes=[replace(LaneState(**x), carry=tuple(x["carry"])) for x in data["lanes"]],
                left_out=tuple(LeftOut(**x) for x in data.get("left_out", ())),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"the saved state of the data stream is damaged or of another version ({error!r}); "
                "go on from another checkpoint."
            ) from error


@dataclass(frozen=True)
class StepRecord:
    """What one rank adds to the state when a step completes; travels with the step's last
    micro-batch.

    Attributes:
        step: number of the step, from 0.
        first_pack, end_pack: the packs q of the whole step, over all ranks.
        lanes: state after the step of the lanes this rank took packs from.
        counts: of this rank's packs.
        bad: samples left out of this rank's packs.
    """

    step: int
    first_pack: int
    end_pack: int
    lanes: dict[int, LaneState]
    counts: dict[str, SourceCounts]
    bad: list[BadSample]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
