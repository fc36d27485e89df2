"""The server's requests. ``python -m tests.training.wandb_server [hang]`` prints its port; with
``hang`` it answers the first look and nothing after.

``GET /state`` shows what it was sent; ``POST /down`` with a number closes it for so many seconds.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.training.wandb_server import KEY, artifacts, runs, sweeps

LOCK = threading.Lock()
FILES: dict[str, bytes] = {}
"""What was put, by path; given back by GET."""
ASKED: list[str] = []
UNKNOWN: list[str] = []
VIEWER = {"id": "V1", "entity": "us", "username": "me", "email": "m@e", "flags": "{}"}
ALWAYS: dict[str, Any] = {
    "Viewer": {"viewer": {**VIEWER, "teams": {"edges": []}}},
    "ServerFeaturesQuery": {"serverInfo": {"features": []}},
    "OrganizationCoreWeaveOrganizationID": {"entity": {"organization": None}},
}
down_until = 0.0


def answer(operation: str, variables: dict[str, Any]) -> dict[str, Any]:
    """Of whoever knows the operation."""
    for part in (runs, artifacts, sweeps):
        if (found := part.answer(operation, variables)) is not None:
            return found
    return ALWAYS[operation]


def state() -> dict[str, Any]:
    """All that it was sent."""
    found = {"files": [*FILES], "asked": ASKED, "unknown": UNKNOWN}
    return {**found, "runs": runs.RUNS, "artifacts": artifacts.ARTIFACTS, "sweeps": sweeps.SWEEPS}


class Handler(BaseHTTPRequestHandler):
    """The requests of a client."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def reply(self, content: Any, code: int = 200) -> None:
        """Send JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def refuses(self) -> bool:
        """While it is down it hangs up."""
        if down := time.monotonic() < down_until:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        return down

    def do_GET(self) -> None:
        """The first look, and ours."""
        if self.path == "/state":
            with LOCK:
                return self.reply(state())
        return None if self.refuses() else self.reply(FILES.get(self.path, {}))

    def do_PUT(self) -> None:
        """A file."""
        body = self.body()
        if not self.refuses():
            with LOCK:
                FILES[self.path] = body
                artifacts.keep(self.path, body)
            self.reply(b"")

    def do_POST(self) -> None:
        """GraphQL, and the stream of a run's lines."""
        global down_until
        body = self.body()
        if self.path == "/down":
            down_until = time.monotonic() + float(body)
            return self.reply({})
        if "hang" in sys.argv:
            time.sleep(3600)
        if self.refuses():
            return None
        if self.path.startswith("/sdk/otel/"):  # how the client fares
            return self.reply(b"")
        given = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic "))
        if given.partition(b":")[2].decode() != KEY:
            return self.reply({"errors": [{"message": "user is not logged in"}]}, 401)
        with LOCK:
            return self.reply(*self.answered(body))

    def answered(self, body: bytes) -> tuple[Any, int]:
        if stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            shares = self.headers.get("X-Wandb-Use-Async-Filestream") == "true"
            client = self.headers["X-Wandb-Async-Client-Id"] if shares else None
            runs.take_lines(stream[1], json.loads(body), client)
            return {"exitcode": None, "limits": {}}, 200
        if self.path != "/graphql":
            UNKNOWN.append(self.path)
            return {}, 404
        content = json.loads(body)
        named = re.search(r"\b(?:query|mutation)\s+(\w+)", content["query"])
        operation = content.get("operationName") or (named[1] if named else "")
        ASKED.append(operation)
        variables = {**(content.get("variables") or {}), "base": f"http://{self.headers['Host']}"}
        try:
            return {"data": answer(operation, variables)}, 200
        except (KeyError, TypeError) as error:  # 400: a client tries again for ever after others
            UNKNOWN.append(f"{operation}: {error!r} {content['query'][:3000]} {variables}")
            return {"errors": [{"message": f"{operation}: {error!r}"}]}, 400


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
