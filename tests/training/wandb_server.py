"""Enough of the W&B server on the loopback for a client to make a run, resume it and send history.

What it was sent is printed as JSON, a line a request. With ``hang`` it answers the first look and
nothing after.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RUNS: dict[str, dict[str, Any]] = {}
PROJECT = {"id": "P1", "name": "p", "entity": {"id": "E1", "name": "us"}}


def run_of(name: str) -> dict[str, Any]:
    """The run of this name, made where it is new."""
    number = base64.b64encode(f"Run:v1:{name}".encode()).decode()
    new = {"id": number, "name": name, "displayName": name, "config": "{}", "project": PROJECT}
    return RUNS.setdefault(name, {"bucket": new, "history": [], "summary": {}})


def resume_status(name: str) -> dict[str, Any]:
    """What a client asks before it makes a run: null, or how much of it is there."""
    if name not in RUNS:
        return {"model": {**PROJECT, "bucket": None}}
    run = RUNS[name]
    tail = json.dumps(run["history"][-1:])
    lines = {"historyLineCount": len(run["history"]), "eventsLineCount": 0, "logLineCount": 0}
    rest = {"summaryMetrics": json.dumps(run["summary"]), "historyTail": tail, "eventsTail": "[]"}
    more = {"tags": [], "notes": None, "wandbConfig": '{"t": 1}'}
    return {"model": {**PROJECT, "bucket": {**run["bucket"], **lines, **rest, **more}}}


def upsert(variables: dict[str, Any]) -> dict[str, Any]:
    """Make or change a run."""
    ids = {run["bucket"]["id"]: name for name, run in RUNS.items()}
    name = variables.get("name") or ids[variables["id"]]
    new = name not in RUNS
    run = run_of(name)
    if variables.get("config") is not None:
        run["bucket"]["config"] = variables["config"]
    bucket = {**run["bucket"], "description": None, "sweepName": None}
    return {"upsertBucket": {"bucket": bucket, "inserted": new}}


def answer(operation: str, variables: dict[str, Any]) -> dict[str, Any]:
    """GraphQL, by the name of the operation."""
    if operation == "UpsertBucket":
        return upsert(variables)
    if operation == "RunResumeStatus":
        return resume_status(variables["name"])
    viewer = {"id": "V1", "entity": "us", "username": "me", "email": "m@e", "flags": "{}"}
    return {
        "Viewer": {"viewer": {**viewer, "teams": {"edges": []}}},
        "ServerFeaturesQuery": {"serverInfo": {"features": []}},
        "RunStoppedStatus": {"project": {"run": {"stopped": False}}},
        "CreateRunFiles": {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": []}},
        "OrganizationCoreWeaveOrganizationID": {"entity": {"organization": None}},
    }[operation]


class Handler(BaseHTTPRequestHandler):
    """The requests of a client."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def reply(self, content: Any, code: int = 200) -> None:
        """Send JSON."""
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """The first look."""
        self.reply({})

    def do_POST(self) -> None:
        """GraphQL, and the stream of a run's lines."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "hang" in sys.argv:
            time.sleep(3600)
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self.take_lines(stream[1], json.loads(body))
            return self.reply({"exitcode": None, "limits": {}})
        if self.path != "/graphql":
            return self.reply({}, 404)
        content = json.loads(body)
        named = re.search(r"\b(?:query|mutation)\s+(\w+)", content["query"])
        operation = content.get("operationName") or (named[1] if named else "")
        try:
            return self.reply({"data": answer(operation, content.get("variables") or {})})
        except KeyError as error:  # 400: a client tries again for ever after anything else
            return self.reply({"errors": [{"message": f"{operation}: {error!r}"}]}, 400)

    def take_lines(self, name: str, content: dict[str, Any]) -> None:
        """Keep history and summary."""
        run = run_of(name)
        for file, chunk in (content.get("files") or {}).items():
            if file == "wandb-summary.json":
                run["summary"] = json.loads(chunk["content"][-1])
            if file == "wandb-history.jsonl":
                first = chunk["offset"]
                run["history"][first : first + len(chunk["content"])] = chunk["content"]
        shown = {"run": name, "history": [json.loads(line) for line in run["history"]]}
        done = {"complete": content.get("complete"), "config": run["bucket"]["config"]}
        print(json.dumps({**shown, **done}), flush=True)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
