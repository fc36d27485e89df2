"""The few calls of the Kubernetes API that ``kubectl`` makes of a launch, on this machine's
loopback: discovery, and what is made, asked, deleted and logged. Nothing runs: a test says what
becomes of what was applied, a stage each time the job is asked for.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KINDS = {
    "v1": {"services": "Service", "pods": "Pod"},
    "batch/v1": {"jobs": "Job"},
    "trainer.kubeflow.org/v1alpha1": {"trainjobs": "TrainJob"},
}
VERBS = ["get", "list", "watch", "create", "delete", "patch"]
JOBS = ("/jobs/", "/trainjobs/")
LABELS = {
    "jobs": "batch.kubernetes.io/job-name={},batch.kubernetes.io/job-completion-index=0",
    "trainjobs": "jobset.sigs.k8s.io/replicatedjob-name=node,jobset.sigs.k8s.io/jobset-name={},"
    "batch.kubernetes.io/job-completion-index=0",
}
"""Selectors of the first pod of a job."""


@dataclass
class Stage:
    """What is so until the job is asked for again.

    Attributes:
        status: of the job.
        pods: by name, their status.
        logs: of each pod its lines, with their times; ``NAME/previous`` of the container before.
        refused: the code with which the server answers.
    """

    status: Mapping[str, Any]
    pods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    logs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    refused: int = 0


class Kubernetes:
    """A server and what it has been told.

    Args:
        stages: of the job, of which the last one stays.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = list(stages)
        self.made: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        self.asked = 0
        """How often the job was asked for since it was made."""

    @property
    def stage(self) -> Stage:
        """That is now."""
        return self.stages[min(max(self.asked, 1), len(self.stages)) - 1]

    def answer(self, method: str, path: str, query: Mapping[str, str], body: bytes) -> Any:
        """The code and the object, or text, that is answered."""
        if method != "GET" or path in self.made:
            self.calls.append(f"{method} {path}")
        if method == "POST":
            made = json.loads(body)
            made["metadata"] |= {"uid": "1", "resourceVersion": "1"}
            self.made[f"{path}/{made['metadata']['name']}"], self.asked = made, 0
            return 201, made
        if method == "DELETE":
            self.made.pop(path, None)
            return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        if path.endswith("/log"):
            return self._log(path.split("/")[-2], query)
        if path.endswith("/pods"):
            return self._pods(query["labelSelector"])
        for pod in self._all_pods():
            if path.endswith(f"/pods/{pod['metadata']['name']}"):
                return 200, pod
        if path not in self.made:
            return _discovery(path) or _failed(404, f"{path} is not found")
        found = self.made[path]
        if any(kind in path for kind in JOBS):
            self.asked += 1
            if code := self.stage.refused:
                return _failed(code, f"{path} is none of yours")
            found = {**found, "status": self.stage.status}
        return 200, found

    def _pods(self, selector: str) -> Any:
        wanted = [
            LABELS[path.split("/")[-2]].format(path.split("/")[-1])
            for path in self.made
            if any(kind in path for kind in JOBS)
        ]
        items = self._all_pods() if selector in wanted else []
        return 200, {"apiVersion": "v1", "kind": "List", "metadata": {}, "items": items[::-1]}

    def _all_pods(self) -> list[dict[str, Any]]:
        return [
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "creationTimestamp": f"2026-01-01T00:00:{i:02}Z"},
                "spec": {"containers": [{"name": "node"}]},
                "status": status,
            }
            for i, (name, status) in enumerate(self.stage.pods.items())
        ]

    def _log(self, pod: str, query: Mapping[str, str]) -> Any:
        assert query["container"] == "node"
        assert query["timestamps"] == "true"
        name = pod + ("/previous" if query.get("previous") == "true" else "")
        if name not in self.stage.logs:
            return _failed(400, f'container "node" in pod "{pod}" is waiting to start')
        since = query.get("sinceTime", "").rstrip("Z")  # in whole seconds, as kubectl sends it
        lines = [line for line in self.stage.logs[name] if line[:19] >= since]
        return 200, "".join(line + "\n" for line in lines)


def _failed(code: int, message: str) -> Any:
    reason = {400: "BadRequest", 403: "Forbidden", 404: "NotFound"}[code]
    return code, {
        "kind": "Status", "apiVersion": "v1", "status": "Failure",
        "reason": reason, "message": message, "code": code,
    }  # fmt: skip


def _discovery(path: str) -> Any:
    if path == "/version":
        return 200, {"major": "1", "minor": "32", "gitVersion": "v1.32.0"}
    if path == "/api":
        return 200, {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = [(one.partition("/")[0], one) for one in KINDS if "/" in one]
        groups = [
            {
                "name": name,
                "versions": [(found := {"groupVersion": one, "version": one.partition("/")[2]})],
                "preferredVersion": found,
            }
            for name, one in versions
        ]
        return 200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version in KINDS:
        resources = [
            {"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind,
             "verbs": VERBS}
            for name, kind in KINDS[version].items()
        ]  # fmt: skip
        return 200, {
            "kind": "APIResourceList", "apiVersion": "v1",
            "groupVersion": version, "resources": resources,
        }  # fmt: skip
    if path == "/openapi/v2":  # without a schema: a protobuf of version, info (title) and paths
        return 200, b"\x0a\x032.0\x12\x06\x0a\x01k\x12\x011\x42\x00"
    return None


@contextmanager
def serving(cluster: Kubernetes, folder: Path) -> Iterator[Path]:
    """A server, and the file for ``$KUBECONFIG`` that names it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def handle_one(self) -> None:
            url = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            code, found = cluster.answer(self.command, unquote(url.path), query, body)
            kind = "application/json"
            if isinstance(found, str):
                found, kind = found.encode(), "text/plain"
            elif isinstance(found, bytes):
                kind = "application/octet-stream"
            else:
                found = json.dumps(found).encode()
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(found)))
            self.end_headers()
            self.wfile.write(found)

        do_GET = do_POST = do_PATCH = do_DELETE = handle_one  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        ],
        "contexts": [{"name": "c", "context": {"cluster": "c"}}],
        "current-context": "c",
    }
    file = folder / "kubeconfig"
    file.write_text(json.dumps(config))
    try:
        yield file
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
