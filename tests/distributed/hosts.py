"""Two hosts as network namespaces, joined by a pair of virtual interfaces; nothing outside them is
touched. Only root can make them, with the program ip.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESSES = {"mmA": "10.77.0.1", "mmB": "10.77.0.2"}


@contextmanager
def two_hosts() -> Iterator[None]:
    """mmA and mmB, which know one another by name."""
    _remove()
    for name in ADDRESSES:
        _ip("netns", "add", name)
    _ip(
        "link",
        "add",
        "mmA0",
        "netns",
        "mmA",
        "type",
        "veth",
        "peer",
        "name",
        "mmB0",
        "netns",
        "mmB",
    )
    hosts = "127.0.0.1 localhost\n" + "".join(f"{a} {name}\n" for name, a in ADDRESSES.items())
    for name, address in ADDRESSES.items():
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", f"{name}0")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "set", f"{name}0", "up")
        folder = Path("/etc/netns") / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text(hosts)
    try:
        yield
    finally:
        _remove()


def start(host: str, command: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Run a program on a host, under its name."""
    named = ["unshare", "-u", "bash", "-c", f'hostname {host}; exec "$@"', "_", *command]
    with log.open("ab") as output:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, *named],
            env={**os.environ, "GLOO_SOCKET_IFNAME": f"{host}0", **env},
            stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip


def cut(host: str) -> None:
    """Its cable."""
    _ip("-n", host, "link", "set", f"{host}0", "down")


def mend(host: str) -> None:
    """Its cable."""
    _ip("-n", host, "link", "set", f"{host}0", "up")


def kill(host: str) -> None:
    """All that runs there, as power does."""
    for pid in _pids(host):
        os.kill(pid, signal.SIGKILL)


def _pids(host: str) -> list[int]:
    done = subprocess.run(
        ["ip", "netns", "pids", host], capture_output=True, text=True, check=False
    )
    return [int(word) for word in done.stdout.split()]


def _remove() -> None:
    for name in ADDRESSES:
        for pid in _pids(name):
            os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
