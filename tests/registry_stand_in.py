"""A registry that speaks the part of OCI's distribution protocol that reading needs: manifests, ranges of blobs, tokens, redirects.

It fails as the stand-in of the hub does (`tests.hub_stand_in.Fault`); spans of blobs are counted there under their labels.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.hub_stand_in import Hub, _Handler, _Server

OCI = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
TITLE = "org.opencontainers.image.title"


def sha(body: bytes) -> str:
    return "sha256:" + hashlib.sha256(body).hexdigest()


@dataclass
class Registry(Hub):
    """What the registry holds and how it fails.

    Attributes:
        blobs: checksum to bytes and label; `manifests`: `REPOSITORY/REFERENCE` to bytes.
        login: the name and secret that a token is given for; None: nobody is asked.
        identity: the token that is exchanged for another, where that is the login.
        valid: the token that opens now; `tokens_given`: how many were.
        storage: where blobs are redirected to; the storage is a registry without manifests.
        asked: of each request its path and its Authorization.
        way: how a login is asked for; `posted`: the forms that token services got; `padding`: bytes in front of a token.
        digests: whether manifests come with Docker-Content-Digest.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    blobs: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    login: tuple[str, str] | None = None
    identity: str = ""
    valid: str = ""
    tokens_given: int = 0
    storage: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    digests: bool = True
    realm: str = ""
    way: str = "Bearer"
    posted: list[dict[str, list[str]]] = field(default_factory=list)
    padding: int = 0

    def put(self, body: bytes, label: str = "") -> str:
        if label or sha(body) not in self.blobs:
            self.blobs[sha(body)] = (body, label)
        return sha(body)

    def push(
        self, where: str, layers: list[tuple[str, bytes, dict[str, str]]],
        config: tuple[str, Any] = ("application/vnd.oci.empty.v1+json", {}), **more: Any,
    ) -> str:  # fmt: skip
        """A manifest of layers (media type, bytes, annotations) under `REPOSITORY:TAG`; returns its checksum."""
        body = json.dumps(config[1]).encode()
        manifest = {
            "schemaVersion": 2, "mediaType": OCI, "config": {"mediaType": config[0], "digest": self.put(body), "size": len(body)},
            "layers": [
                {"mediaType": media, "digest": self.put(data, notes.get(TITLE) or media.rpartition(".")[2]), "size": len(data),
                 **({"annotations": notes} if notes else {})}
                for media, data, notes in layers
            ], **more,
        }  # fmt: skip
        return self.name(where, json.dumps(manifest).encode())

    def name(self, where: str, body: bytes) -> str:
        repository, _, tag = where.partition(":")
        self.manifests[f"{repository}/{tag}"] = self.manifests[f"{repository}/{sha(body)}"] = body
        return sha(body)

    @contextlib.contextmanager
    def serve(self) -> Iterator[str]:
        """Its address, for the time of the block."""
        server = _Server(("127.0.0.1", 0), _Registry)
        server.hub = self
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.realm = f"http://127.0.0.1:{server.server_port}/token"
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            self.freed.set()
            server.shutdown()
            server.server_close()


class _Registry(_Handler):
    server: Any

    def do_GET(self) -> None:
        registry: Registry = self.server.hub
        path, own = urlsplit(self.path).path, self.headers.get("Authorization")
        registry.asked.append((path, own))
        if path == "/token":
            basic = "Basic " + base64.b64encode(":".join(registry.login or ("", "")).encode()).decode()
            scope = parse_qs(urlsplit(self.path).query).get("scope")
            return self.give(own == basic and scope == ["repository:acme/desk:pull"])
        if registry.login and own != f"Bearer {registry.valid}":
            ask = f'{registry.way} realm="{registry.realm}",service="stand-in",scope="repository:acme/desk:pull"'
            return self.answer(401, b"{}", WWW_Authenticate=ask)
        kind = "blobs" if "/blobs/" in path else "manifests"
        repository, _, reference = path.removeprefix("/v2/").partition(f"/{kind}/")
        if kind == "manifests":
            body = registry.manifests.get(f"{repository}/{reference}")
            if body is None:
                return self.answer(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}')
            stated = {"Docker_Content_Digest": sha(body)} if registry.digests else {}
            return self.body("", body, 0, len(body), 200, Content_Type=OCI, **stated)
        body, label = registry.blobs.get(reference, (None, ""))
        if body is None:
            return self.answer(404)
        if registry.storage:
            return self.answer(307, Location=f"{registry.storage}{self.path}")
        asked = self.headers.get("Range")
        if asked is None:
            return self.body("", body, 0, len(body), 200)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(len(body), int(last) + 1)
        self.body(label, body, start, stop, 206, Content_Range=f"bytes {start}-{stop - 1}/{len(body)}")

    def do_POST(self) -> None:
        registry: Registry = self.server.hub
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        registry.asked.append((self.path, self.headers.get("Authorization")))
        registry.posted.append(form)
        self.give(bool(registry.identity) and form.get("refresh_token") == [registry.identity])

    def give(self, known: bool) -> None:
        registry: Registry = self.server.hub
        if not known:
            return self.answer(401, b"{}")
        registry.tokens_given += 1
        registry.valid = f"token-{registry.tokens_given}"
        self.answer(
            200,
            b" " * registry.padding + json.dumps({"token": registry.valid, "expires_in": 60}).encode(),
            Content_Type="application/json",
        )


def tar(files: Mapping[str, bytes], packing: str = "", **odd: Any) -> bytes:
    """An archive; `odd`: attributes of a last entry of no bytes."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=f"w:{packing}") as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        if odd:
            entry = tarfile.TarInfo()
            for key, value in odd.items():
                setattr(entry, key, value)
            archive.addfile(entry, io.BytesIO())
    return made.getvalue()
