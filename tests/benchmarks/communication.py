"""What a rank hands to collectives in an optimizer step, under each strategy: every operation of
torch.distributed is counted in a real run on two processes.

    python -m tests.benchmarks.mid_size runs/mid_size
    python -m tests.benchmarks.communication runs/mid_size/recipe.yaml

What a rank then sends depends on the number of ranks N, by :data:`SENT`; docs/scaling.md goes on
from there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training import jobs

STRATEGIES = {
    name: [f"--strategy={name}"]
    for name in ("ddp", "deepspeed_1", "deepspeed_2", "deepspeed_3", "fsdp2")
} | {"sequence_parallel": ["--strategy=ddp", "--sequence_parallel=2"]}
SMALL = 4096
"""Bytes; counts and flags are below."""
KINDS = {
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
}
SENT: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
    "reduce": lambda n: (n - 1) / n,
}
"""Bytes that each of n ranks sends for each byte of the whole tensor, in a ring; of what it hands
over, where each rank has something for every other.
"""
Counts = dict[str, int]


class Collectives(TorchDispatchMode):
    """Adds up the whole tensors of collectives: what is reduced, or what has been gathered.

    Attributes:
        bytes: by kind, and ``small`` for the number of those below :data:`SMALL`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name in KINDS:
                whole = max(_bytes(args[0]), _bytes(args[1]) if len(args) > 1 else 0)
                kind = "small" if whole < SMALL else KINDS[name]
                self.bytes[kind] += 1 if kind == "small" else whole
            elif name != "barrier":
                raise NotImplementedError(name)
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, Iterable) else 0


class CountCollectives(L.Callback):
    """Counts a whole step, from the end of the one before.

    Args:
        out: JSON file that rank 0 writes.
        step: which.
    """

    def __init__(self, out: str, step: int = 3) -> None:
        self.out, self.step, self.mode = Path(out), step, Collectives()

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """The sizes of the parts, before they are divided."""
        begin = trainer.strategy.setup

        def count_and_begin(of: L.Trainer) -> None:
            llm, every = pl_module.model.llm, list(pl_module.parameters())
            trained = _size(p for p in every if p.requires_grad)
            self.sizes = {
                "trained": trained,
                "trained in the LLM": _size(p for p in llm.parameters() if p.requires_grad),
                "LLM": _size(llm.parameters()),
                "its layers": sum(_size(layer.parameters()) for layer in llm.layers),
                "its head": _size(llm.head.parameters()),
            }
            begin(of)

        trainer.strategy.setup = count_and_begin  # type: ignore[method-assign]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.global_step == self.step - 1:
            self.mode.__enter__()
        elif trainer.global_step == self.step:
            self.mode.__exit__(None, None, None)
            if trainer.is_global_zero:
                found = {"counted": dict(self.mode.bytes), "sizes": self.sizes}
                self.out.write_text(json.dumps(found))


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def count(recipe: str, options: Sequence[str], folder: Path) -> tuple[Counts, Counts]:
    """Bytes of a step by kind of collective, and of the parts. ``folder`` is made."""
    folder.mkdir()
    args = ["fit", "-c", recipe, f"--run_dir={folder}/run", *options, "--trainer.max_steps=4"]
    args += ["--trainer.devices=2", "--trainer.callbacks=" + NAME]
    args += [f"--trainer.callbacks.out={folder}/found.json"]
    codes = jobs.run_ranks(args, folder / "log", 2)
    if set(codes) != {0}:
        raise RuntimeError("".join(path.read_text() for path in folder.glob("log.*")))
    found = json.loads((folder / "found.json").read_text())
    return found["counted"], found["sizes"]


def main() -> None:
    """Count one recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--strategies", nargs="+", default=[*STRATEGIES], choices=[*STRATEGIES])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.strategies:
            given = [*STRATEGIES[name], "--data.packs_per_step=2"]
            counted, sizes = count(options.recipe, given, Path(folder, name))
            print(f"{name}: {_told(counted)}, of parts with {_told(sizes)}", flush=True)


def _told(counts: Counts) -> str:
    found = {k: n if k == "small" else f"{n / 1e6:.3f} MB" for k, n in sorted(counts.items())}
    return ", ".join(f"{kind} {amount}" for kind, amount in found.items())


NAME = "tests.benchmarks.communication.CountCollectives"

if __name__ == "__main__":
    main()
