"""A job of Kubernetes as ``kubectl`` tells of it: its state and the log of its first pod."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from typing import Any

from mmfusion.tools.launch.client import asked, reason, said

RESOURCES = {"TrainJob": "trainjob.trainer.kubeflow.org", "Job": "job.batch"}
PODS = {
    "trainjob.trainer.kubeflow.org": "jobset.sigs.k8s.io/replicatedjob-name=node,"
    "jobset.sigs.k8s.io/jobset-name=",
    "job.batch": "batch.kubernetes.io/job-name=",
}
"""Labels of the pods of a kind, up to the job's name."""
FIRST = "batch.kubernetes.io/job-completion-index=0"
ENDS = {"Complete": "COMPLETED", "Failed": "FAILED"}
UNKNOWN = "UNKNOWN"
REFUSED = ("(Forbidden)", "(Unauthorized)")
"""Of what the server says: it will say so for ever. A server that is away comes back."""


class Pods:
    """A job of Kubernetes.

    Args:
        name: ``job.batch/NAME`` or ``trainjob.trainer.kubeflow.org/NAME``.
        namespace: of it.
    """

    def __init__(self, name: str, namespace: str) -> None:
        self.name, self.namespace = name, namespace
        self._first: list[Any] = []
        self._told: dict[str, str] = {}
        self._starts: dict[str, int] = {}
        self._whole: set[str] = set()

    def submit(self, text: str) -> str:
        """Apply it; a job of this name that has ended would stay as it is, and is deleted before.

        Returns:
            said: by ``kubectl``.

        Raises:
            ValueError: with what ``kubectl`` says where that cannot be.
        """
        before = self.state()
        if before.startswith(UNKNOWN):
            raise ValueError(f"kubectl failed: {before.removeprefix(UNKNOWN)[2:-1]}")
        if before.split()[0] in ENDS.values():
            # With its pods, or their logs would be taken for those of the new one.
            said(self._kubectl("delete", self.name, "--cascade=foreground"))
        return said(["kubectl", "apply", "-f", "-"], text)

    def state(self) -> str:
        """In the words of Slurm.

        Raises:
            ValueError: where the server will not say.
        """
        done = asked(self._kubectl("get", self.name, "-o", "json"))
        if "(NotFound)" in done.stderr:
            return "CANCELLED (deleted)"
        if done.returncode:
            if any(word in done.stderr for word in REFUSED):
                raise ValueError(f"kubectl cannot follow {self.name}: {reason(done)}")
            return f"{UNKNOWN} ({reason(done)})"
        self._first = self._first_pods()
        state = state_in(json.loads(done.stdout))
        why = waits_for(self._first[-1]) if self._first else ""
        return f"PENDING ({why})" if state == "PENDING" and why else state

    def log(self) -> Iterator[str]:
        """What is new in the log of the first pod, and of those that it took the place of."""
        for pod in self._first:
            name = str(pod["metadata"]["name"])
            if name in self._whole:
                continue
            if _restarts(pod) > self._starts.get(name, 0):
                yield from self._lines(name, "--previous")
            self._starts[name] = _restarts(pod)
            read = yield from self._lines(name)
            if read and pod["status"].get("phase") in ("Succeeded", "Failed"):
                self._whole.add(name)

    def _lines(self, pod: str, *options: str) -> Generator[str, None, bool]:
        """Behind those that are known. The server counts in seconds: times of lines are compared
        here.

        Returns:
            Whether the server gave them.
        """
        before = self._told.get(pod, "")
        since = [f"--since-time={before}"] if before else []
        done = asked(self._kubectl("logs", pod, "-c", "node", "--timestamps", *since, *options))
        for line in done.stdout.splitlines(keepends=True) if not done.returncode else ():
            time, _, text = line.partition(" ")
            if time > before:
                self._told[pod] = time
                yield text
        return not done.returncode

    def _first_pods(self) -> list[Any]:
        """The pods so far of the first machine, the newest one last."""
        resource, _, name = self.name.partition("/")
        label = f"{PODS[resource]}{name},{FIRST}"
        done = asked(self._kubectl("get", "pods", "-l", label, "-o", "json"))
        if done.returncode:
            return self._first
        pods: list[Any] = json.loads(done.stdout)["items"]
        return sorted(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def _kubectl(self, *words: str) -> list[str]:
        return ["kubectl", "-n", self.namespace, *words]


def state_in(job: Mapping[str, Any]) -> str:
    """Of a Job or a TrainJob as the server has it: running where all of its pods are."""
    status, spec = job.get("status", {}), job["spec"]
    met = {one["type"]: one for one in status.get("conditions", ()) if one["status"] == "True"}
    for kind, word in ENDS.items():
        if kind in met:
            why = ": ".join(filter(None, [met[kind].get("reason"), met[kind].get("message")]))
            return f"FAILED ({why})" if kind == "Failed" and why else word
    if "Suspended" in met:
        return "PENDING (Suspended)"
    if job["kind"] == "TrainJob":
        return "RUNNING" if any(one["ready"] for one in status.get("jobsStatus", ())) else "PENDING"
    there = status.get("ready", 0) + status.get("succeeded", 0)
    return "RUNNING" if there >= spec["completions"] else "PENDING"


def waits_for(pod: Mapping[str, Any]) -> str:
    """What keeps a pod from running, such as ``ImagePullBackOff``; empty where nothing is said."""
    status = pod["status"]
    waiting = [x["state"].get("waiting", {}) for x in status.get("containerStatuses", ())]
    place = [x for x in status.get("conditions", ()) if x["type"] == "PodScheduled"]
    for one in (*waiting, *(x for x in place if x["status"] == "False")):
        if why := ": ".join(filter(None, [one.get("reason"), one.get("message")])):
            return why
    return ""


def _restarts(pod: Mapping[str, Any]) -> int:
    """Of its container in its place."""
    return sum(one["restartCount"] for one in pod["status"].get("containerStatuses", ()))
