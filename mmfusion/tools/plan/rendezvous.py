"""``mmfusion plan --test``: do all ranks meet, and does a sum reach all of them?

Under a launcher (torchrun, Slurm) this process is one rank of it; else as many processes are
started on this machine. They sum by NCCL where each has a GPU, else by gloo. Ranks first write
their names into a store that rank 0 (or torchrun's agent) keeps, so whoever is missing can be
named; only then the process group is made.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

SECONDS = 60.0
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RendezvousError(ValueError):
    """Ranks that did not come, or a sum that is none."""


@dataclass(frozen=True)
class Place:
    """Of one process among all.

    Attributes:
        rank: its number.
        world: how many there are.
        local: its number on its machine.
        host: where the store is.
        port: of the store.
        keeps: whether this process keeps the store.
    """

    rank: int
    world: int
    local: int
    host: str
    port: int
    keeps: bool


def place_of(environment: Mapping[str, str]) -> Place | None:
    """This process's, as its launcher says; None where there is none."""
    if all(environment.get(name) for name in VARIABLES):
        rank, agent = int(environment["RANK"]), environment.get("TORCHELASTIC_USE_AGENT_STORE")
        return Place(
            rank,
            int(environment["WORLD_SIZE"]),
            int(environment.get("LOCAL_RANK", 0)),
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            keeps=rank == 0 and agent != "True",
        )
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    if not SLURMEnvironment.detect():
        return None
    slurm = SLURMEnvironment(auto_requeue=False)
    rank = slurm.global_rank()
    return Place(
        rank, slurm.world_size(), slurm.local_rank(), slurm.main_address, slurm.main_port, rank == 0
    )


def meet(place: Place, seconds: float = SECONDS) -> str:
    """Meet the others, and sum with them.

    Raises:
        RendezvousError: naming the ranks that did not come within the time.
    """
    import torch
    import torch.distributed

    dist: Any = torch.distributed  # it does not tell mypy of its stores
    ends = time.monotonic() + seconds
    try:
        store = dist.TCPStore(
            place.host,
            place.port,
            is_master=place.keeps,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
        names = dist.PrefixStore(f"plan/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        names.set(f"{place.rank}", f"{socket.gethostname()} (process {os.getpid()})")
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        raise RendezvousError(
            f"rank {place.rank}: the store of rank 0 at {place.host}:{place.port} cannot be had "
            f"within {seconds:g} s ({str(error).splitlines()[0]}). Expected: it answers. Do this: "
            "start rank 0, open the port between the machines, or name the right MASTER_ADDR."
        ) from error
    away = _missing(names, place.world, ends)
    if away:
        came = [rank for rank in range(place.world) if rank not in away]
        raise RendezvousError(
            f"{_ranks(away)} of {place.world} did not come within {seconds:g} s. Expected: all "
            f"ranks; {_ranks(came)} came. Do this: look at the logs of the machines of those that "
            "are missing, and start as many processes on each as --gpus says."
        )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", place.local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    left = timedelta(seconds=max(1.0, ends - time.monotonic()))
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", names),
            rank=place.rank,
            world_size=place.world,
            timeout=left,
        )
        sum_ = torch.tensor([place.rank + 1.0], device=device)
        dist.all_reduce(sum_)
        total = float(sum_)
    except (dist.DistError, RuntimeError) as error:
        raise RendezvousError(
            f"rank {place.rank}: all {place.world} ranks came, but {backend} failed to sum over "
            f"them ({str(error).splitlines()[0]}). Expected: a sum. Do this: set the network "
            "interface of launch/env.sh (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); with "
            "NCCL_DEBUG=INFO NCCL says more."
        ) from error
    finally:
        if dist.is_initialized():
            with suppress(RuntimeError):
                dist.destroy_process_group()
    if total != (wanted := place.world * (place.world + 1) / 2):
        raise RendezvousError(
            f"rank {place.rank}: {backend} gave a sum of {total:g}, expected {wanted:g}."
        )
    names.set(f"done {place.rank}", "1")
    if place.keeps:  # the store must outlive what the others ask of it
        _missing(names, place.world, ends, "done ")
    return f"{place.world} ranks met and summed over {backend}"


def _missing(store: Any, world: int, ends: float, before: str = "") -> list[int]:
    """Ranks whose names are not in the store when the time is up."""
    away = [*range(world)]
    while True:
        away = [rank for rank in away if not store.check([f"{before}{rank}"])]
        if not away or time.monotonic() >= ends:
            return away
        time.sleep(0.1)


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (", ..." if ranks[16:] else "")
    return f"rank{'' if len(ranks) == 1 else 's'} {shown}" if ranks else "none"


def meet_here(world: int, seconds: float = SECONDS, leave_out: Sequence[int] = ()) -> str:
    """Start the ranks on this machine, and have them meet.

    Args:
        world: ranks.
        seconds: that they have, besides the time that Python takes to start.
        leave_out: ranks that are not started.

    Raises:
        RendezvousError: as :func:`meet`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    few = torch.cuda.device_count() < world
    hidden = {"OMP_NUM_THREADS": "1", **({"CUDA_VISIBLE_DEVICES": ""} if few else {})}
    started = {
        rank: subprocess.Popen(
            [sys.executable, "-m", __name__, str(seconds)],
            env={**os.environ, **hidden, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(world)
        if rank not in leave_out
    }
    told: dict[int, dict[str, str]] = {}
    ends = time.monotonic() + 2 * seconds + 60
    for rank, process in started.items():
        try:
            said, _ = process.communicate(timeout=max(0.1, ends - time.monotonic()))
            told[rank] = json.loads(said.splitlines()[-1])
        except (subprocess.TimeoutExpired, IndexError, ValueError):
            process.kill()
            process.communicate()
            told[rank] = {"error": f"rank {rank} ended with code {process.returncode}, no word."}
    if errors := [told[rank]["error"] for rank in sorted(told) if "error" in told[rank]]:
        raise RendezvousError(errors[0])
    return f"{told[0]['met']} on this machine"


def main() -> None:
    """One rank; says how it went as a line of JSON."""
    place = place_of(os.environ)
    assert place, "started by meet_here"
    try:
        print(json.dumps({"met": meet(place, float(sys.argv[1]))}), flush=True)
    except RendezvousError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
