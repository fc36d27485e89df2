"""Runs of the command in processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["tests.training.tiny", "mmfusion.training.command", "transformers"]
CONTEXT.set_forkserver_preload(PRELOAD)
ROOT = str(Path(__file__).parents[2])


def start(
    args: Sequence[str],
    log: Path,
    env: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> BaseProcess:
    """Start ``mmfusion ARGS``, its output into ``log``."""
    os.environ["PYTHONPATH"] = ROOT  # for the fork server, where it starts now
    process = CONTEXT.Process(target=_job, args=(list(args), str(log), env or {}, prepare))
    process.start()
    return process


def run(args: Sequence[str], log: Path, **options: object) -> int | None:
    """Run to the end; the exit code."""
    process = start(args, log, **options)  # type: ignore[arg-type]
    process.join()
    return process.exitcode


def run_ranks(
    args: Sequence[str],
    log: Path,
    world: int,
    last_rank: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> list[int | None]:
    """Run as ``torchrun --nproc-per-node=WORLD`` does; the exit codes. ``last_rank`` are arguments
    of the last rank alone.
    """
    ranks = start_ranks(args, log, world, last_rank, env=env)
    for process in ranks:
        process.join()
    return [process.exitcode for process in ranks]


def start_ranks(
    args: Sequence[str],
    log: Path,
    world: int,
    last_rank: Sequence[str] = (),
    prepare: Callable[[], None] | None = None,
    env: dict[str, str] | None = None,
    of_each: Callable[[int], dict[str, str]] = lambda rank: {},
) -> list[BaseProcess]:
    """Start them only. ``of_each`` gives variables of one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(
            [*args, *last_rank] if rank == world - 1 else args,
            log.with_suffix(f".{rank}"),
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "test",
                # What an earlier run in the same process leaves behind; it must mean nothing here.
                "MMFUSION_RESUME_FROM": "1:",
                "MMFUSION_INIT_FROM": "1:",
                **(env or {}),
                **of_each(rank),
            },
            prepare,
        )
        for rank in range(world)
    ]


def kill(process: BaseProcess) -> None:
    """SIGKILL, and wait."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def _job(
    args: list[str], log: str, env: dict[str, str], prepare: Callable[[], None] | None
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update({**env, "MMFUSION_TRACEBACK": "1"})
    sys.argv = ["mmfusion", *args]
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only.rank = int(env.get("RANK", 0))  # known at import where processes are not forked
    if prepare is not None:
        prepare()
    from mmfusion.cli import main

    main(args)
