"""What ``mmfusion plan`` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mmfusion.tools.plan.checks import Checked
from mmfusion.tools.plan.gpus import GPU, TERA
from mmfusion.tools.plan.memory import RESERVED, Memory
from mmfusion.tools.plan.recipe import Planned
from mmfusion.tools.plan.tracing import BACKWARD, ELSEWHERE, FORWARD, RECOMPUTE
from mmfusion.tools.plan.work import GPU_HOURS_A_FAILURE, Work
from mmfusion.training.strategies.names import OURS

GIB, MIB = 1 << 30, 1 << 20
COLUMNS = (
    "parameters", "frozen", "gradients", "optimizer", "activations", "transient", "total",
)  # fmt: skip
MEMORY_NOTE = (
    "At the moment that takes most. parameters: what trains, with a strategy's copies. transient: "
    "buckets, gathered weights, the optimizer's step. fits: with 1 GiB for CUDA, NCCL and "
    "workspaces; refused: the strategy does not take the recipe. Not counted: fragmentation, "
    "loader processes, judges, answers of validations."
)


def memory_table(found: Sequence[Memory], gpu: GPU, world: int) -> Table:
    """A line a strategy."""
    table = Table(
        title=f"GiB of each of {world} GPUs, which have {gpu.memory / GIB:.1f} ({gpu.name})",
        title_justify="left",
    )
    # As wide as those of one word; the recipe's own may have options, which are wrapped.
    table.add_column("strategy", min_width=max(map(len, OURS)))
    for name in COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("fits")
    if host := any(memory.host for memory in found):
        table.add_column("host", justify="right")
    for memory in found:
        row = [f"{getattr(memory, name) / GIB:,.2f}" for name in COLUMNS]
        fits = "yes" if memory.fits(gpu.memory) else "refused" if memory.refused else "no"
        shown = [f"{memory.host / GIB:,.2f}" if memory.host else ""] if host else []
        table.add_row(memory.strategy, *row, fits, *shown)
    return table


def activations_table(planned: Planned) -> Table:
    """Where activations are, and what computes."""
    seen = planned.seen
    table = Table(
        title=f"A micro-batch: activations at their peak, GFLOP (of {planned.given.origin})",
        title_justify="left",
    )
    table.add_column("part")
    for name in ("MiB", "forward", "forward again", "backward"):
        table.add_column(name, justify="right")
    outside = {FORWARD, ELSEWHERE}  # what no part's module does
    parts = dict.fromkeys([*seen.by_part, *(part for _, part in seen.flops)])
    for part in (*(part for part in parts if part not in outside | {BACKWARD}), ELSEWHERE):
        names = outside if part == ELSEWHERE else {part}
        size = sum(seen.by_part.get(name, 0) for name in names)
        flops = [sum(seen.flops.get((p, n), 0.0) for n in names) for p in (FORWARD, RECOMPUTE)]
        table.add_row(part, f"{size / MIB:,.1f}", *(f"{x / 1e9:,.1f}" if x else "" for x in flops))
    table.add_row("backward", f"{seen.by_part.get(BACKWARD, 0) / MIB:,.1f}")
    table.add_section()
    sums = [f"{seen.work(phase) / 1e9:,.1f}" for phase in (FORWARD, RECOMPUTE, BACKWARD)]
    table.add_row("all", f"{seen.activations / MIB:,.1f}", *sums)
    return table


def work_lines(found: Work, gpu: GPU, gpus: int, mfu: float, every: int) -> list[str]:
    """Tokens, FLOPs, days, checkpoints."""
    again = f", and {found.recompute / TERA:,.2f} a second time" if found.recompute else ""
    days = "the run has no end"
    if found.days is not None:
        days = f"{_time(found.days)} for {found.steps:,} steps"
    return [
        f"A step: {found.tokens:,.0f} tokens, {found.flops / TERA:,.2f} TFLOP: "
        f"{found.frozen / TERA:,.2f} forward in frozen parts, {found.trained / TERA:,.2f} forward "
        f"in the others, {found.backward / TERA:,.2f} backward{again}.",
        f"The run: {found.seconds:,.3g} s a step at {mfu:.0%} of {gpus} x "
        f"{gpu.flops / TERA:,.0f} TFLOP/s; {days}. Reading data, saving and validation come on "
        "top.",
        f"A checkpoint: {found.checkpoint / GIB:,.3f} GiB, what trains or trained before, and the "
        f"optimizer's state. checkpoint.every_n_steps is {every}; {found.every:,} lose least time "
        f"(a failure each {GPU_HOURS_A_FAILURE:,} GPU hours, 1 GB/s to disk, at most an hour "
        "between two).",
    ]


def checks_table(found: Sequence[Checked]) -> Table:
    """A line a check."""
    table = Table(title="Checks", title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("")
    table.add_column("found", overflow="fold")
    for check in found:
        table.add_row(check.name, "ok" if check.passed else "[bold red]FAILED[/]", check.said)
    return table


def memory_problem(found: Sequence[Memory], gpu: GPU, wanted: str | None) -> str:
    """What is wrong with the recipe's own strategy, or with all of them; else what fits."""
    fitting = [memory.strategy for memory in found if memory.fits(gpu.memory)]
    takes = [memory for memory in found if not memory.refused]
    least = min(takes, key=lambda memory: memory.total)
    own = next((memory for memory in found if memory.strategy == wanted), None)
    usable = (gpu.memory - RESERVED) / GIB
    do = f"use {fitting[0]}" if fitting else _smaller()
    if own is not None and own.refused:
        raise ValueError(f"trainer.strategy {own.strategy} refuses the recipe: {own.refused}")
    if own is not None and not own.fits(gpu.memory):
        raise ValueError(
            f"trainer.strategy {own.strategy}: it takes {own.total / GIB:.1f} GiB of a GPU. "
            f"Expected: at most {usable:.1f} on {gpu.name}. Do this: {do}."
        )
    if not fitting:
        raise ValueError(
            f"no strategy fits: {least.strategy} takes least, {least.total / GIB:.1f} GiB of a "
            f"GPU. Expected: at most {usable:.1f} on {gpu.name}. Do this: {_smaller()}."
        )
    said = "fits: " + ", ".join(fitting)
    if wanted and own is None:
        said += f". trainer.strategy {wanted} is none that is planned: its memory is not known"
    return said


def _smaller() -> str:
    return (
        "set gradient_checkpointing of the LLM, make data.pack_tokens or "
        "data.packs_per_micro_batch smaller, keep frozen parts in bfloat16, or take more GPUs"
    )


def _time(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    return f"{days * 24:,.1f} hours" if days * 24 >= 1 else f"{days * 86400:,.0f} s"
