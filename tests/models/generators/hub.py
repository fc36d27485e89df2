"""A hub on this machine: one model repository, as huggingface_hub asks for its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "c0ffee" * 6 + "c0ff"


@contextmanager
def serve(folder: Path, name: str) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub with this repository, and the files that were asked for, in order.

    Args:
        folder: of the repository.
        name: ``owner/name``.
    """
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith(f"/{name}/resolve/"):
                self.file(path.removeprefix(f"/{name}/resolve/").partition("/")[2])
            elif path.startswith(f"/api/models/{name}"):
                files = [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()]
                about = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                tree = [{"type": "file", "path": f, "size": 1, "oid": "0"} for f in files]
                self.answer(200, json.dumps(tree if "/tree/" in path else about).encode())
            else:
                self.answer(404, b"", **{"X-Error-Code": "RepoNotFound"})

        def file(self, wanted: str) -> None:
            if self.command == "GET":
                asked.append(wanted)
            if not (folder / wanted).is_file():
                gone = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
                return self.answer(404, b"", **gone)
            content = (folder / wanted).read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.answer(200, content, **{"ETag": etag, "X-Repo-Commit": COMMIT})

        def answer(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Not on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
