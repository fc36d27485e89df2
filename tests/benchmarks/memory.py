"""Memory of a command with all processes it starts: once a second the sum of their PSS, in which a
page that several share is counted once. Linux only.

    python -m tests.benchmarks.memory mmfusion quickstart --small

Prints the largest sum, the processes it was made of, and the peak RSS of the largest process, which
is what ``throughput/rss_peak_gib`` and the quickstart's ``memory_gib`` say.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path


def tree(pid: int) -> list[int]:
    """A process and all that it started, and they; those that have ended are left out."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def gib(pid: int, file: str, field: str) -> float:
    """A field of a process's ``smaps_rollup`` or ``status``, in GiB; 0 where it has ended."""
    found = re.search(rf"^{field}:\s+(\d+) kB", read(pid, file), re.M)
    return int(found[1]) / 2**20 if found else 0.0


def read(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def main(command: list[str], every: float = 1.0) -> int:
    """Run it and sample it every so many seconds; its exit code."""
    process = subprocess.Popen(command)
    largest, alone, parts = 0.0, 0.0, {}
    while process.poll() is None:
        now = {pid: gib(pid, "smaps_rollup", "Pss") for pid in tree(process.pid)}
        alone = max(alone, *(gib(pid, "status", "VmHWM") for pid in now))
        if sum(now.values()) > largest:
            largest = sum(now.values())
            parts = {pid: (pss, read(pid, "cmdline")) for pid, pss in now.items()}
        time.sleep(every)
    print(f"\nall processes together: {largest:.2f} GiB (PSS)")
    for pid, (pss, command_line) in parts.items():
        print(f"  {pss:.2f} GiB  {pid} {command_line.replace(chr(0), ' ')[:80]}")
    print(f"the largest process:    {alone:.2f} GiB (RSS)")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
