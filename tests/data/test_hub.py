"""Datasets come from a hub that speaks the real HTTP API; its refusals are told apart.

`HF_ENDPOINT` is read when the hub's client is imported, so each case runs in a process of its own against a server in
this one.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

pytest.importorskip("datasets", reason="needs the extra `hub`")

COMMIT = "a" * 40
FILES = {
    "README.md": b"---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: small/train.csv\n"
    b"  - split: test\n    path: small/test.csv\n- config_name: other\n  data_files: other.csv\n---\n",
    "small/train.csv": b"text,label\nwhere is my card,card\nmy pin is gone,pin\n",
    "small/test.csv": b"text,label\nsend a card,card\n",
    "other.csv": b"text,label\nhello,greet\n",
}
REFUSED = {"acme/none": (404, "RepoNotFound"), "acme/gated": (403, "GatedRepo")}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that reading a dataset needs."""

    protocol_version = "HTTP/1.1"

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
        if path in FILES:
            oid = hashlib.sha1(FILES[path]).hexdigest()
            return {"type": "file", "path": path, "size": len(FILES[path]), "oid": oid}
        return {"type": "directory", "path": path, "size": 0, "oid": "b" * 40}

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for name, (status, code) in REFUSED.items():
            if f"datasets/{name}" in path:
                return self.answer(status, X_Error_Code=code, X_Error_Message=code)
        api, raw = "/api/datasets/acme/desk", "/datasets/acme/desk/resolve/"
        if path.startswith(raw):
            revision, _, file = path[len(raw) :].partition("/")
            if revision not in ("main", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if file not in FILES:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            tag = f'"{hashlib.sha1(FILES[file]).hexdigest()}"'
            return self.answer(200, FILES[file], ETag=tag, X_Repo_Commit=COMMIT)
        if path == api or path.startswith(f"{api}/revision/"):
            if path.rpartition("/")[2] not in ("desk", "main", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": name} for name in FILES]
            return self.json({"id": "acme/desk", "sha": COMMIT, "private": False, "gated": False, "siblings": siblings})
        if path.startswith(f"{api}/tree/"):
            folder = path[len(f"{api}/tree/") :].partition("/")[2]
            inside = [name for name in FILES if not folder or name.startswith(folder + "/")]
            if not inside:
                return self.answer(404, X_Error_Code="EntryNotFound")
            depth = len(folder.split("/")) if folder else 0
            if "recursive" in parse_qs(urlsplit(self.path).query) and "True" in self.path:
                return self.json([self.entry(name) for name in inside])
            return self.json([self.entry(e) for e in {"/".join(name.split("/")[: depth + 1]): 0 for name in inside}])
        return self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "/paths-info/" in self.path:
            if "application/json" in self.headers.get("Content-Type", ""):
                paths = json.loads(body)["paths"]
            else:
                paths = parse_qs(body.decode())["paths"]
            known = [p for p in paths if p in FILES or any(name.startswith(p + "/") for name in FILES)]
            return self.json([self.entry(path) for path in known])
        return self.answer(404)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


CODE = """
import json, sys
from slmops.core.spec import Data
from slmops.data.readers import read
from slmops.errors import SlmopsError
out = []
for path in sys.argv[1:]:
    try:
        reading = read(Data(path=path))
        out.append({s: [[r.example.text, r.example.answer] for r in rows] for s, rows in reading.splits.items()})
    except SlmopsError as error:
        out.append([type(error).__name__, str(error), error.hint])
print(json.dumps(out))
"""


def ask(endpoint: str, home: Path, *paths: str) -> list[object]:
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *paths],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **hub},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


SMALL = {
    "train": [["where is my card", "card"], ["my pin is gone", "pin"]],
    "test": [["send a card", "card"]],
}


@pytest.mark.slow
def test_reading_from_a_hub(endpoint: str, tmp_path: Path) -> None:
    got = ask(
        endpoint, tmp_path,
        "hf:acme/desk:small", f"hf:acme/desk:other@{COMMIT}", "hf:acme/desk", "hf:acme/desk:small@v9", "hf:acme/none",
        "hf:acme/gated", "hf:acme desk",
    )  # fmt: skip
    assert got[0] == SMALL
    assert got[1] == {"train": [["hello", "greet"]]}
    for answer, says, hint in zip(
        got[2:],
        ["Config name is missing", "no such revision", "no such dataset", "gated", "not a dataset id"],
        [":CONFIG", "after the @", "HF_TOKEN", "ask for access", "hf:ORG/NAME"],
        strict=True,
    ):
        assert isinstance(answer, list)
        assert answer[0] == "DataError"
        assert says in answer[1]
        assert hint in answer[2]


@pytest.mark.slow
def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    (answer,) = ask("http://127.0.0.1:9", tmp_path, "hf:acme/desk")
    assert isinstance(answer, list)
    assert "cannot be reached" in answer[1]
    assert "HF_ENDPOINT" in answer[2]
