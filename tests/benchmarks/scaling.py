"""The arithmetic of docs/scaling.md: its formulas, its constants with where they are from, and the
tables that they give.

    python -m tests.benchmarks.scaling

prints the tables as they are in the page; a test compares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

GPU_HOURS_A_FAILURE = 50_000
"""419 unexpected interruptions of 16,384 H100 in 54 days are 50,700 (arXiv:2407.21783, 3.3.4)."""
FLOPS, MFU = 989e12, 0.4
"""An H100's dense bf16 peak (NVIDIA's data sheet), and what of it is assumed to be used."""
INSIDE, BETWEEN = 0.8 * 450e9, 0.8 * 400e9
"""Bytes a second that each GPU of a ring sends: 80 % (assumed) of NVLink 4 in one direction within
a node, of eight NDR adapters of 50 GB/s that a node's eight GPUs share between nodes."""
HOP = 2.5e-6
"""Seconds from one GPU of a ring to the next, the mean of seven inside a node and one between two
(assumed)."""
WRITE = 1e9
"""Bytes a second that one process writes a checkpoint with (assumed)."""
TO_HOST = 10e9
"""Bytes a second from a GPU to pageable memory of the host (assumed)."""
STORAGE = 100e9
"""Bytes a second that a cluster's shared storage gives to all readers (assumed)."""
TOKENS = 8192
"""Of a micro-batch."""
NODE = 8
LIVE = 1e9
"""Gathered numbers that ZeRO stage 3 keeps (its ``max_live_parameters``)."""
ROOM = 75e9
"""Bytes of an 80 GB GPU that are left for weights, gradients and the optimizer's state, at most."""
WORLDS = (8, 1_000, 10_000)
DETECT, START = 600.0, 300.0
"""Seconds until a lost host is noticed (``timeout_minutes``), and from the start of the processes
to the first step without reading the checkpoint (assumed)."""


@dataclass(frozen=True)
class LLaMA:
    """Sizes of a LLaMA; ``kv`` is the width of its keys."""

    layers: int
    hidden: int
    inner: int
    kv: int
    vocabulary: int = 32_000

    @property
    def linear(self) -> list[tuple[int, int]]:
        """In and out of a layer's linear maps: q, k, v, o, gate, up, down."""
        h, i = self.hidden, self.inner
        return [(h, h), (h, self.kv), (h, self.kv), (h, h), (h, i), (h, i), (i, h)]

    @property
    def layer(self) -> int:
        return sum(a * b for a, b in self.linear) + 2 * self.hidden

    @property
    def rest(self) -> int:
        """Embeddings, output head, last norm."""
        return 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.rest

    def lora(self, rank: int) -> int:
        return self.layers * rank * sum(a + b for a, b in self.linear)


@dataclass(frozen=True)
class Case:
    """A run: LLaVA's projector (1024 to the LLM's width and once more), and the LLM with LoRA of
    rank 128, frozen in bf16, or trained whole, in fp32.
    """

    name: str
    llm: LLaMA
    full: bool

    @property
    def projector(self) -> int:
        return 1024 * self.llm.hidden + self.llm.hidden**2 + 2 * self.llm.hidden

    @property
    def adapters(self) -> int:
        return 0 if self.full else self.llm.lora(128)

    @property
    def trained(self) -> int:
        return self.projector + (self.llm.parameters if self.full else self.adapters)

    @property
    def frozen(self) -> int:
        return 0 if self.full else self.llm.parameters

    @property
    def checkpoint(self) -> int:
        """Bytes: weights and AdamW's two moments in fp32."""
        return 12 * self.trained

    @property
    def compute(self) -> float:
        """Seconds of a micro-batch: forward 2 FLOPs a parameter and token, backward 2 for what
        goes on to earlier layers, 2 for weights that train.
        """
        flops = (6 if self.full else 4) * self.llm.parameters + 6 * self.adapters
        return flops * TOKENS / (FLOPS * MFU)


SMALL, LARGE = LLaMA(32, 4096, 11008, 4096), LLaMA(80, 8192, 28672, 1024)
CASES = (
    Case("7B LoRA", SMALL, False),
    Case("7B full", SMALL, True),
    Case("70B LoRA", LARGE, False),
    Case("70B full", LARGE, True),
)

# ---- communication of an optimizer step of one micro-batch: (kind, bytes whole, operations)

Traffic = list[tuple[str, float, int]]


def ddp(case: Case) -> Traffic:
    """Gradients in fp32, once a step, in buckets of 25 MiB."""
    size = 4 * case.trained
    return [("all-reduce", size, math.ceil(size / (25 << 20)))]


def zero_2(case: Case) -> Traffic:
    """Gradients are all-reduced as well (DeepSpeed's ``use_multi_rank_bucket_allreduce``), then
    the weights that train are gathered.
    """
    buckets = math.ceil(case.trained / 200e6)
    size = 4 * case.trained
    return [("all-reduce", size, buckets), ("all-gather", size, buckets)]


def zero_3(case: Case) -> Traffic:
    """The LLM is gathered for the forward and for the backward pass as it is kept, a weight at a
    time (prefetched up to 50 million together), but for a billion numbers that DeepSpeed leaves
    gathered in between; its head and the projector once a step.
    """
    llm, width = case.llm, 4 if case.full else 2
    head = llm.vocabulary * llm.hidden
    divided = width * (llm.parameters - head) + 4 * case.adapters
    again = max(0.0, divided - width * LIVE)
    fetches = llm.layers * math.ceil(llm.layer / 50e6)
    whole = width * head + 4 * case.projector
    reduced = 4 * case.trained
    return [
        ("all-gather", divided, fetches),
        ("all-gather", again, fetches),
        ("reduce-scatter", reduced, math.ceil(case.trained / 200e6)),
        ("all-gather", whole, 1),
    ]


def fsdp2(case: Case) -> Traffic:
    """Layers are gathered in bf16 for the forward and for the backward pass, the rest once as it is
    kept; gradients are scattered in fp32, a layer at a time.
    """
    llm, width = case.llm, 4 if case.full else 2
    layers = 2 * (llm.layers * llm.layer + case.adapters)
    return [
        ("all-gather", layers, llm.layers),
        ("all-gather", layers, llm.layers),
        ("all-gather", width * llm.rest + 4 * case.projector, 1),
        ("reduce-scatter", 4 * case.trained, llm.layers + 1),
    ]


STRATEGIES: dict[str, Callable[[Case], Traffic]] = {
    "ddp": ddp,
    "deepspeed_1, _2": zero_2,
    "deepspeed_3": zero_3,
    "fsdp2": fsdp2,
}


def sent(traffic: Traffic, world: int) -> float:
    """Bytes that each GPU sends, in a ring."""
    ways = {"all-reduce": 2}
    return sum(ways.get(kind, 1) * size for kind, size, _ in traffic) * (world - 1) / world


def seconds(traffic: Traffic, world: int) -> float:
    """Of all of it, nothing overlapped: what is sent, and the way around. An all-reduce may take a
    tree, whose way is short.
    """
    trees = [2 * math.log2(world) * HOP * n for kind, _, n in traffic if kind == "all-reduce"]
    rings = [(world - 1) * HOP * n for kind, _, n in traffic if kind != "all-reduce"]
    wire = INSIDE if world <= NODE else BETWEEN
    return sum(trees) + sum(rings) + sent(traffic, world) / wire


def states(strategy: str, case: Case, world: int) -> float:
    """Bytes of weights, gradients and optimizer state on each GPU, without what is on its way."""
    trained, frozen = case.trained, 2 * case.frozen
    outside = 4 * case.projector + (4 if case.full else 2) * case.llm.vocabulary * case.llm.hidden
    return {
        "ddp": 16 * trained + frozen,
        "deepspeed_1, _2": 4 * trained + 16 * trained / world + frozen,
        "deepspeed_3": (20 * trained + frozen) / world + outside,
        "fsdp2": (16 * trained + frozen) / world,
    }[strategy]


# ---- checkpoints and failures


def failures(world: int) -> float:
    """Mean seconds between two of a run."""
    return GPU_HOURS_A_FAILURE * 3600 / world


def interval(stop: float, world: int) -> float:
    """Seconds between checkpoints that lose least, where each stops the run for ``stop`` (Young,
    1974).
    """
    return math.sqrt(2 * stop * failures(world))


def lost(stop: float, every: float, world: int, restart: float) -> float:
    """Share of the time that goes to saving, to steps that are repeated and to coming back, where
    failures come at random (Daly, 2006).
    """
    mean = failures(world)
    expected = mean * math.exp(restart / mean) * math.expm1((every + stop) / mean)
    return 1 - every / expected


def gathering(case: Case, world: int) -> float:
    """Seconds of bringing together what is divided: weights and both moments, a collective for
    each. Nothing is where ``ddp`` fits.
    """
    if _fit("ddp", case, world):
        return 0.0
    tensors = 3 * (case.llm.layers * (9 if case.full else 14) + (7 if case.full else 4))
    wire = INSIDE if world <= NODE else BETWEEN
    return tensors * (world - 1) * HOP + case.checkpoint / wire


def stops(case: Case, world: int, behind: bool) -> float:
    """Seconds that a checkpoint stops the run: the copy to the host, and the file."""
    copied = gathering(case, world) + case.checkpoint / TO_HOST
    return copied + (0 if behind else case.checkpoint / WRITE)


def resume(case: Case, world: int) -> float:
    """Seconds to read a checkpoint: every node reads the file once."""
    nodes = math.ceil(world / NODE)
    return max(case.checkpoint / WRITE, nodes * case.checkpoint / STORAGE)


# ---- the tables


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sizes_table() -> str:
    head = ["", "trains", "frozen", "checkpoint", "a micro-batch's compute"]
    return table(
        head,
        (
            [
                c.name,
                _millions(c.trained),
                _millions(c.frozen) if c.frozen else "",
                f"{_gigabytes(c.checkpoint)} GB",
                f"{c.compute:.2f} s",
            ]
            for c in CASES
        ),
    )


def states_table() -> str:
    head = ["GB on each GPU", *(f"{c.name}, {w:,}" for c in CASES for w in (8, 1_000))]
    return table(
        head,
        (
            [name, *(_fits(states(name, c, w)) for c in CASES for w in (8, 1_000))]
            for name in STRATEGIES
        ),
    )


def traffic_table() -> str:
    head = ["", "GB sent", *(f"{w:,} GPUs" for w in WORLDS), "compute"]
    rows = [
        [
            f"{case.name}, `{name.split(',')[0]}`",
            _gigabytes(sent(of(case), 1_000)),
            *(f"{seconds(of(case), w):.2f} s" if _fit(name, case, w) else "-" for w in WORLDS),
            f"{case.compute:.2f} s",
        ]
        for case in CASES
        for name, of in STRATEGIES.items()
        if _fit(name, case, max(WORLDS))
    ]
    return table(head, rows)


def checkpoint_table() -> str:
    head = ["", "file", "a step waits, 1,000 GPUs", "with `behind`", "host of rank 0 (`behind`)"]
    head += ["each host at resume", *(f"read by {w:,} GPUs" for w in WORLDS[1:])]
    rows = []
    for case in CASES:
        size = case.checkpoint
        gathered = 0 if _fit("ddp", case, 1_000) else size
        reads = [
            f"{math.ceil(w / NODE) * size / 1e12:,.1f} TB, {_time(resume(case, w))}"
            for w in WORLDS[1:]
        ]
        rows.append(
            [
                case.name,
                f"{_gigabytes(size)} GB",
                _time(stops(case, 1_000, False)),
                _time(stops(case, 1_000, True)),
                f"{_gigabytes(gathered)} GB ({_gigabytes(gathered + size)} GB)",
                # Mapped where ranks divide it, so that a host has it once; else read by each.
                f"{_gigabytes(size if gathered else NODE * size)} GB",
                *reads,
            ]
        )
    return table(head, rows)


def failures_table() -> str:
    head = ["", "GPUs", "a failure every", "save every", "lost", "`behind`: every", "lost"]
    rows = []
    for case in CASES:
        for world in WORLDS:
            if not _fit("fsdp2", case, world):
                continue
            restart = DETECT + START + resume(case, world)
            cells = [case.name, f"{world:,}", _time(failures(world))]
            for behind in (False, True):
                stop = stops(case, world, behind)
                # One that is still being written is not followed by another.
                every = max(interval(stop, world), case.checkpoint / WRITE if behind else 0)
                cells += [_time(every), f"{100 * lost(stop, every, world, restart):.1f} %"]
            rows.append(cells)
    return table(head, rows)


TABLES = (sizes_table, states_table, traffic_table, checkpoint_table, failures_table)


def _millions(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}" if size < 100e9 else f"{size / 1e9:,.0f}"


def _fit(strategy: str, case: Case, world: int) -> bool:
    return states(strategy, case, world) < ROOM


def _fits(size: float) -> str:
    told = _gigabytes(size)
    return told if size < ROOM else f"({told})"


def _time(value: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if value >= 2 * length:
            return (
                f"{value / length:.1f} {unit}"
                if value < 10 * length
                else f"{value / length:.0f} {unit}"
            )
    return f"{value:.1f} s"


if __name__ == "__main__":
    print("\n\n".join(make() for make in TABLES))
