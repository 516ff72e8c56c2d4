"""A hub of models and datasets that speaks the part of the real HTTP API that reading one repository needs.

`HF_ENDPOINT` is read when the hub's client is imported, so whoever asks this one does it in a process of its own, with
the environment that `client` gives.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "a" * 40


@dataclass
class Hub:
    """What the hub holds and how it fails.

    Attributes:
        files: path to content of its one repository, acme/desk, which is at commit `COMMIT`.
        kind: `datasets` or `models`.
        refused: other repositories: name to status and error code.
        cut: how often the body of each file still ends in its middle.
        served: how often a file's body was sent whole, or from its middle.
    """

    files: Mapping[str, bytes]
    kind: str = "datasets"
    refused: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def serve(self) -> Iterator[str]:
        """Its address, for the time of the block."""
        server = _Server(("127.0.0.1", 0), _Handler)
        server.hub = self
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()


def client(endpoint: str, home: Path) -> dict[str, str]:
    """The environment in which the real client asks `endpoint`; `home` is its cache."""
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **hub}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json", X_Repo_Commit=COMMIT)

    def entry(self, path: str) -> dict[str, object]:
        files = self.server.hub.files
        if path in files:
            return {
                "type": "file",
                "path": path,
                "size": len(files[path]),
                "oid": hashlib.sha1(files[path]).hexdigest(),
            }
        return {"type": "directory", "path": path, "size": 0, "oid": "b" * 40}

    def do_GET(self) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        for name, (status, code) in hub.refused.items():
            if f"/{name}" in path:
                return self.answer(status, X_Error_Code=code, X_Error_Message=code)
        api, raw = f"/api/{hub.kind}/acme/desk", f"{'/datasets' if hub.kind == 'datasets' else ''}/acme/desk/resolve/"
        if path.startswith(raw):
            return self.file(*path[len(raw) :].partition("/")[::2])
        if path == api or path.startswith(f"{api}/revision/"):
            if path.rpartition("/")[2] not in ("desk", "main", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": name} for name in hub.files]
            return self.json({"id": "acme/desk", "sha": COMMIT, "private": False, "gated": False, "siblings": siblings})
        if path.startswith(f"{api}/tree/"):
            return self.tree(path[len(f"{api}/tree/") :].partition("/")[2])
        return self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def file(self, revision: str, name: str) -> None:
        hub = self.server.hub
        if revision not in ("main", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if name not in hub.files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        body = hub.files[name]
        tag = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(200, body, **tag)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0] or 0)
        if hub.cut.get(name, 0) > 0:
            hub.cut[name] -= 1
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start : start + (len(body) - start) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        hub.served.append(name)
        if not start:
            return self.answer(200, body, **tag)
        span = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self.answer(206, body[start:], Content_Range=span, **tag)

    def tree(self, folder: str) -> None:
        inside = [name for name in self.server.hub.files if not folder or name.startswith(folder + "/")]
        if not inside:
            return self.answer(404, X_Error_Code="EntryNotFound")
        depth = len(folder.split("/")) if folder else 0
        if "recursive" in parse_qs(urlsplit(self.path).query) and "True" in self.path:
            return self.json([self.entry(name) for name in inside])
        return self.json([self.entry(e) for e in {"/".join(name.split("/")[: depth + 1]): 0 for name in inside}])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "/paths-info/" in self.path:
            if "application/json" in self.headers.get("Content-Type", ""):
                paths = json.loads(body)["paths"]
            else:
                paths = parse_qs(body.decode())["paths"]
            files = self.server.hub.files
            known = [p for p in paths if p in files or any(name.startswith(p + "/") for name in files)]
            return self.json([self.entry(path) for path in known])
        return self.answer(404)
