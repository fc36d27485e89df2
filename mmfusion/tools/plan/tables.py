"""What ``mmfusion plan`` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mmfusion.tools.plan.checks import Checked
from mmfusion.tools.plan.gpus import GPU
from mmfusion.tools.plan.memory import RESERVED, Memory
from mmfusion.tools.plan.recipe import Planned
from mmfusion.tools.plan.work import Work

GIB = 1 << 30
COLUMNS = (
    "parameters", "frozen", "gradients", "optimizer", "activations", "transient", "total",
)  # fmt: skip
MEMORY_NOTE = (
    "By strategy, at the moment that takes most. parameters: what trains, with a strategy's copies. "
    "transient: buckets, gathered weights, the optimizer's step. fits: with 1 GiB for CUDA, NCCL "
    "and workspaces. Not counted: fragmentation, loader processes, judges."
)


def memory_table(found: Sequence[Memory], gpu: GPU, world: int) -> Table:
    """A line a strategy."""
    table = Table(
        title=f"GiB of each of {world} GPUs, which have {gpu.memory / GIB:.1f} ({gpu.name})",
        title_justify="left",
    )
    table.add_column("strategy", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("fits")
    if host := any(memory.host for memory in found):
        table.add_column("host", justify="right")
    for memory in found:
        row = [f"{getattr(memory, name) / GIB:,.2f}" for name in COLUMNS]
        fits = "yes" if memory.fits(gpu.memory) else "no"
        shown = [f"{memory.host / GIB:,.2f}" if memory.host else ""] if host else []
        table.add_row(memory.strategy, *row, fits, *shown)
    return table


def activations_table(planned: Planned) -> Table:
    """Where activations are, and what computes."""
    seen = planned.seen
    table = Table(title=f"Of a micro-batch ({planned.given.origin})", title_justify="left")
    table.add_column("part")
    for name in ("activations, GiB", "forward, TFLOP", "backward, TFLOP"):
        table.add_column(name, justify="right")
    parts = dict.fromkeys([*seen.by_part, *(part for _, part in seen.flops)])
    for part in parts:
        flops = [seen.flops.get((phase, part), 0.0) / 1e12 for phase in ("forward", "recompute")]
        size = f"{seen.by_part.get(part, 0) / GIB:.3f}"
        table.add_row(part, size, f"{flops[0]:.3f}", f"{flops[1]:.3f} again" if flops[1] else "")
    table.add_section()
    back = sum(n for (phase, _), n in seen.flops.items() if phase == "backward") / 1e12
    forward = sum(n for (phase, _), n in seen.flops.items() if phase == "forward") / 1e12
    table.add_row("all", f"{seen.activations / GIB:.3f}", f"{forward:.3f}", f"{back:.3f}")
    return table


def work_lines(found: Work, gpu: GPU, gpus: int, mfu: float, every: int) -> list[str]:
    """Tokens, FLOPs, days, checkpoints."""
    share = "of which frozen parts"
    lines = [
        f"step: {found.tokens:,.0f} tokens, {found.flops / 1e12:,.1f} TFLOP (forward "
        f"{(found.frozen + found.trained) / 1e12:,.1f}, {share} {found.frozen / 1e12:,.1f}; "
        f"backward {found.backward / 1e12:,.1f})"
        + (f" and {found.recompute / 1e12:,.1f} a second time" if found.recompute else ""),
        f"time: {found.seconds:,.3f} s a step at {mfu:.0%} of {gpus} x "
        f"{gpu.flops / 1e12:,.0f} TFLOP/s"
        + (
            f", {_time(found.days)} for {found.steps:,} steps"
            if found.steps is not None and found.days is not None
            else "; the run has no end"
        ),
        f"checkpoint: {found.checkpoint / GIB:,.3f} GiB (what trains, and the optimizer's state)",
        f"checkpoint.every_n_steps: {every} in the recipe; {found.every:,} lose least (Young's "
        f"rule: a failure each 50,000 GPU hours, 1 GB/s to disk; at most an hour apart)",
    ]
    return lines


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
    least = min(found, key=lambda memory: memory.total)
    own = next((memory for memory in found if memory.strategy == wanted), None)
    usable = (gpu.memory - RESERVED) / GIB
    if own is not None and not own.fits(gpu.memory):
        do = f"use {fitting[0]}" if fitting else _smaller()
        raise ValueError(
            f"trainer.strategy {own.strategy}: it takes {own.total / GIB:.1f} GiB of a GPU. "
            f"Expected: at most {usable:.1f} on {gpu.name}. Do this: {do}."
        )
    if not fitting:
        raise ValueError(
            f"no strategy fits: {least.strategy} takes least, {least.total / GIB:.1f} GiB of a "
            f"GPU. Expected: at most {usable:.1f} on {gpu.name}. Do this: {_smaller()}."
        )
    return "fits: " + ", ".join(fitting)


def _smaller() -> str:
    return (
        "set gradient_checkpointing of the LLM, make data.pack_tokens or "
        "data.packs_per_micro_batch smaller, keep frozen parts in bfloat16, or take more GPUs"
    )


def _time(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    return f"{days * 24:,.1f} hours" if days * 24 >= 1 else f"{days * 1440:,.1f} minutes"
