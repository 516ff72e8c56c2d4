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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "a" * 40


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer.

    Attributes:
        kind: `status`: this code instead; `cut`: the body ends after so many bytes; `wrong`: its last byte is another;
            `stall`: it waits after so many bytes, `freed` or the end of the hub ends that; `loop`: it redirects to itself;
            `whole`: all of the file comes, whatever was asked for; `other`: another part comes.
        value: the code or the number.
        headers: more headers of a `status`.
    """

    kind: Literal["status", "cut", "wrong", "stall", "loop", "whole", "other"]
    value: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Hub:
    """What the hub holds and how it fails.

    Attributes:
        files: path to content of its one repository, acme/desk, which is at commit `COMMIT`.
        kind: `datasets` or `models`.
        refused: other repositories: name to status and error code.
        cut: how often the body of each file still ends in its middle.
        served: how often a file's body was sent whole, or from its middle.
        fault: asked before each answer, with the file's name ("" for the listing) and the first byte asked for.
        spans: of each body of a file: its name, the first byte sent, how many were sent, and whether they were right.
        stalled, freed: an answer has come to where it waits; it may go on.
        about: more of what the listing says.
        commit: where the repository stands.
        tokens: what each request gave to be let in.
    """

    files: Mapping[str, bytes]
    kind: str = "datasets"
    refused: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)
    fault: Callable[[str, int], Fault | None] | None = None
    spans: list[tuple[str, int, int, bool]] = field(default_factory=list)
    stalled: Event = field(default_factory=Event)
    freed: Event = field(default_factory=Event)
    about: dict[str, Any] = field(default_factory=dict)
    commit: str = COMMIT
    tokens: list[str | None] = field(default_factory=list)

    @contextlib.contextmanager
    def serve(self) -> Iterator[str]:
        """Its address, for the time of the block."""
        server = _Server(("127.0.0.1", 0), _Handler)
        server.hub = self
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            self.freed.set()
            server.shutdown()
            server.server_close()


def client(endpoint: str, home: Path) -> dict[str, str]:
    """The environment in which the real client asks `endpoint`; `home` is its cache."""
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **hub}


def sibling(name: str, body: bytes) -> dict[str, object]:
    """How the API lists a file: small ones by git's checksum of them, others by SHA-256 too."""
    entry: dict[str, object] = {"rfilename": name, "size": len(body), "blobId": git_digest(body)}
    if name.endswith((".safetensors", ".gguf", ".onnx", ".bin", ".npz")):
        entry["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return entry


def git_digest(body: bytes) -> str:
    """SHA-1 of a file as git takes it."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def tensors(fill: bytes, size: int, name: str = "a") -> bytes:
    """A safetensors file of `size` bytes with one tensor."""
    count = size - 8 - 96
    header = json.dumps({name: {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode().ljust(96)
    return len(header).to_bytes(8, "little") + header + fill * count


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
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
        hub.tokens.append(self.headers.get("Authorization"))
        path = unquote(urlsplit(self.path).path)
        for name, (status, code) in hub.refused.items():
            if f"/{name}" in path:
                return self.answer(status, X_Error_Code=code, X_Error_Message=code)
        api, raw = f"/api/{hub.kind}/acme/desk", f"{'/datasets' if hub.kind == 'datasets' else ''}/acme/desk/resolve/"
        if path.startswith(raw):
            return self.file(*path[len(raw) :].partition("/")[::2])
        if path == api or path.startswith(f"{api}/revision/"):
            if path.rpartition("/")[2] not in ("desk", "main", hub.commit):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            siblings = [sibling(name, body) for name, body in hub.files.items()]
            info = {"id": "acme/desk", "sha": hub.commit, "private": False, "gated": False, "siblings": siblings}
            listing = json.dumps(info | hub.about).encode()
            return self.body(
                "", listing, 0, len(listing), 200, Content_Type="application/json", X_Repo_Commit=hub.commit
            )
        if path.startswith(f"{api}/tree/"):
            return self.tree(path[len(f"{api}/tree/") :].partition("/")[2])
        return self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def file(self, revision: str, name: str) -> None:
        hub = self.server.hub
        if revision not in ("main", hub.commit):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if name not in hub.files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        body = hub.files[name]
        tag = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(200, body, **tag)
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first or 0), min(len(body), int(last) + 1 if last else len(body))
        if hub.cut.get(name, 0) > 0:
            hub.cut[name] -= 1
            return self.body(name, body, start, stop, 206 if start else 200, Fault("cut", (stop - start) // 2))
        if (start, stop) == (0, len(body)):
            return self.body(name, body, 0, stop, 200, **tag)
        tag["Content_Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        return self.body(name, body, start, stop, 206, **tag)

    def body(
        self, name: str, body: bytes, start: int, stop: int, status: int, fault: Fault | None = None, **headers: str
    ) -> None:
        """Part of a body, or what goes wrong with it."""
        hub = self.server.hub
        fault = fault or (hub.fault(name, start) if hub.fault else None)
        kind, value = (fault.kind, fault.value) if fault else ("", 0)
        if fault and kind == "status":
            return self.answer(value, b"not now", **{k.replace("-", "_"): v for k, v in fault.headers.items()})
        if kind == "loop":
            return self.answer(302, Location=self.path)
        if kind == "whole":
            start, stop, status = 0, len(body), 200
            headers.pop("Content_Range", None)
        elif kind == "other":
            start = max(0, start - 1)
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
            status = 206
        content = body[start:stop]
        if kind == "wrong" and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(status)
        for key, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), text)
        self.end_headers()
        sent = min(value, len(content)) if kind in ("cut", "stall") else len(content)
        if name:
            hub.spans.append((name, start, sent, kind not in ("wrong", "other", "whole")))
        self.wfile.write(content[:sent])
        self.wfile.flush()
        if kind == "stall":
            hub.stalled.set()
            hub.freed.wait(60)
        if kind in ("cut", "stall"):
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif name:
            hub.served.append(name)

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
