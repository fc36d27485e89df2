"""A real Slurm on this machine: one controller, and a daemon for each of its nodes, which are all
this machine. Without systemd, cgroups or a database; only root can start one.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# The time that credentials hold is also how long a job waits that is queued again.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
PlugStackConfig=/dev/null
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
ReturnToService=2
JobRequeue=1
MinJobAge=3600
MessageTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=n[1-{count}] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=n[1-{count}] PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Programs that are not on this machine."""
    path = os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"
    return [name for name in PROGRAMS if not shutil.which(name, path=path)]


class Cluster:
    """Nodes n1, n2, ...

    Args:
        folder: of its files.
        count: of nodes.
    """

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.folder, self.count = folder, count
        self.config = folder / "slurm.conf"
        self.environment = {
            "SLURM_CONF": str(self.config),
            "PATH": os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin",
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = [_free_port() for _ in range(count + 1)]

    def start(self) -> None:
        """Start it, and wait until its nodes are idle."""
        munge = self.folder / "munge"
        munge.mkdir(parents=True)
        (self.folder / "state").mkdir()
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
        self._run("munged", "--foreground", "--force", f"--socket={munge}/socket", *files)
        _wait(lambda: (munge / "socket").exists(), 10)
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={self._ports[i]} CPUs=4 "
            "Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN"
            for i in range(1, self.count + 1)
        )
        self.config.write_text(
            CONFIG.format(
                host=host, port=self._ports[0], folder=self.folder, nodes=nodes, count=self.count
            )
        )
        self._run("slurmctld", "-D", "-f", str(self.config))
        for i in range(1, self.count + 1):
            self.start_node(f"n{i}")
        idle = ("sinfo", "-hN", "-p", "low", "-t", "idle")
        _wait(lambda: self.said(*idle).count("\n") == self.count, 30)

    def start_node(self, name: str) -> None:
        """The daemon of a node."""
        (self.folder / f"spool.{name}").mkdir(exist_ok=True)
        self._run("slurmd", "-D", "-N", name, "-f", str(self.config), key=name)

    def kill_node(self, name: str) -> None:
        """As power does: its daemon and all that it has started."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()
        for pid in _tasks(name):
            os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """All jobs and daemons."""
        self.said("scancel", "-u", "root")
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def said(self, *command: str) -> str:
        """What a client prints."""
        environment = {**os.environ, **self.environment}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        ).stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.said("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _run(self, *command: str, key: str | None = None) -> None:
        log = (self.folder / f"{key or command[0]}.out").open("ab")
        self._daemons[key or command[0]] = subprocess.Popen(
            command, env={**os.environ, **self.environment}, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "Slurm does not start"
        time.sleep(0.05)


def _tasks(node: str) -> set[int]:
    """Processes that run on a node, and the daemons of their steps."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "environ").read_bytes().split(b"\0")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if f"SLURMD_NODENAME={node}".encode() in words:
                found.add(int(process.name))
                if (Path("/proc") / str(parent) / "comm").read_text().startswith("slurmstepd"):
                    found.add(parent)
        except (OSError, IndexError):  # it has ended meanwhile
            continue
    return found
