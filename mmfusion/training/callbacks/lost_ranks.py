"""Says which ranks are not heard of any more, where a rank has waited for others in vain."""

from __future__ import annotations

import platform
import re
import threading
import time
from contextlib import suppress
from typing import Any, cast

import lightning as L
import torch.distributed as dist

from mmfusion.training.agreement import gather

TIMED_OUT = re.compile(r"Timed out waiting \d+ms|collective operation timeout")
CLOSED = re.compile(r"Connection (closed|reset) by peer")
"""What gloo and NCCL say of a rank that does not answer, and of one whose process has ended."""
KEY = "mmfusion/alive/"
PATIENCE = 5.0
"""Seconds: ranks that wait for one that is gone give up at about the same moment."""
MOST_NAMED = 8


class LostRanks(L.Callback):
    """Knows the hosts of all ranks. A collective that fails names none of them; each rank that is
    left writes its number into the process group's store then, and looks whose are there.

    Args:
        minutes: after which a rank does not wait any longer.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self._hosts: list[str] = []
        self._rank = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Every rank's host, to every rank."""
        self._hosts, self._rank = gather([platform.node()]), trainer.global_rank

    def told(self, error: BaseException) -> str | None:
        """Of an error that ends the run: what it means; None where no rank is lost."""
        why = str(error)
        timed_out = bool(TIMED_OUT.search(why))
        if len(self._hosts) < 2 or not (timed_out or CLOSED.search(why)):
            return None
        if not timed_out:
            return (
                f"{self._name(self._rank)} has lost the connection to another rank of "
                f"{len(self._hosts)}, whose process has ended; look at what that one said last. "
                f"The same command goes on from the newest checkpoint. ({why})"
            )
        silent = self._silent()
        names = ", ".join(self._name(rank) for rank in silent[:MOST_NAMED])
        more = f" and {len(silent) - MOST_NAMED} more" if len(silent) > MOST_NAMED else ""
        what = f"nothing of {names}{more}" if silent else "no rank that had come as far"
        return (
            f"{self._name(self._rank)} has heard {what} for {60 * self.minutes:g} seconds "
            "(timeout_minutes). That host is down, the network to it is cut, or its process hangs: "
            "look at what it said last (and at stuck-RANK.txt in the run directory). The same "
            "command goes on from the newest checkpoint; where a rank may take longer, raise "
            f"--timeout_minutes. ({why})"
        )

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"

    def _silent(self) -> list[int]:
        """Ranks that do not say that they are there; rank 0, which keeps the store, where that does
        not answer.
        """
        store = cast(Any, dist.distributed_c10d)._get_default_store()
        others = [rank for rank in range(len(self._hosts)) if rank != self._rank]
        found: list[list[int]] = []

        def ask() -> None:
            with suppress(RuntimeError):
                store.set(f"{KEY}{self._rank}", "")
                time.sleep(PATIENCE)
                found.append([rank for rank in others if not store.check([f"{KEY}{rank}"])])

        asks = threading.Thread(target=ask, daemon=True)  # for ever, where the network is cut
        asks.start()
        asks.join(2 * PATIENCE)
        return found[0] if found else [0]
