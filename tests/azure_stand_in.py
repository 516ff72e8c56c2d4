"""Azure AI Foundry as its SDK asks for it: discovery of a registry, a model and its versions, a signed address, and a store of blobs.

The SDK wants TLS and Azure's own names, so `Carrier`, its transport here, sends each request to this server with the name as the first
part of the path; all of the SDK above that runs as it is. Shapes are those that the SDK's own models read.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from azure.core.pipeline.transport import RequestsTransport

from tests.hub_stand_in import Hub, _Handler, _Server

DISCOVERY, MFE, STORE = "eastus.api.azureml.ms", "cert-eastus.experiments.azureml.net", "desk0.blob.core.windows.net"


@dataclass
class Foundry(Hub):
    """What the registry `azureml` holds.

    Attributes:
        files: name to content in the folder of the one model, Desk-1.
        unsummed: names without an MD5; `bare`: those whose pieces come without one too.
        versions: of the model; `tags`: of each.
        signature: what opens the store now; `signed`: how often one was given.
        asked: host and path of each request; `opened`: the Authorization of each.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    unsummed: set[str] = field(default_factory=set)
    bare: set[str] = field(default_factory=set)
    versions: tuple[str, ...] = ("1", "2")
    tags: dict[str, str] = field(
        default_factory=lambda: {"license": "mit", "author": "Acme", "task": "chat-completion"}
    )
    signature: str = "s0"
    signed: int = 0
    asked: list[str] = field(default_factory=list)
    opened: list[tuple[str, str | None]] = field(default_factory=list)
    etag: str = "0x1"

    @contextlib.contextmanager
    def serve(self) -> Iterator[str]:
        """Its address, for the time of the block."""
        server = _Server(("127.0.0.1", 0), _Foundry)
        server.hub = self
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            self.freed.set()
            server.shutdown()
            server.server_close()


class Carrier(RequestsTransport):
    """Carries requests for any host to the stand-in."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def send(self, request: Any, **options: Any) -> Any:
        parts = urlsplit(request.url)
        request.url = f"{self.url}/{parts.netloc}{parts.path}" + (f"?{parts.query}" if parts.query else "")
        return super().send(request, **options)


class Somebody:
    """A login that is always good."""

    def get_token(self, *scopes: str, **options: Any) -> Any:
        from azure.core.credentials import AccessToken

        return AccessToken("token", 4_000_000_000)


class _Foundry(_Handler):
    server: Any

    def do_GET(self) -> None:
        foundry: Foundry = self.server.hub
        parts = urlsplit(self.path)
        host, _, path = parts.path.lstrip("/").partition("/")
        path, query = "/" + unquote(path), {key: value[0] for key, value in parse_qs(parts.query).items()}
        foundry.asked.append(f"{self.command} {host}{path}")
        foundry.opened.append((host, self.headers.get("Authorization")))
        if self.command == "POST":
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if host == STORE:
            return self.store(path, query)
        value = self.about(host, path)
        if value is None:
            return self.answer(
                404, b'{"error": {"code": "NotFound", "message": "no such model"}}', Content_Type="application/json"
            )
        body = json.dumps(value).encode()
        self.body("", body, 0, len(body), 200, Content_Type="application/json")

    do_POST = do_GET

    def about(self, host: str, path: str) -> Any:
        foundry: Foundry = self.server.hub
        if host == DISCOVERY and path == "/registrymanagement/v1.0/registries/azureml/discovery":
            return {
                "registryName": "azureml", "primaryRegion": "eastus", "primaryRegionResourceProviderUri": f"https://{MFE}/",
                "resourceGroup": "group", "subscriptionId": "subscription", "registryFqdns": {"eastus": {"uri": f"https://{MFE}"}},
            }  # fmt: skip
        home = "/mferp/managementfrontend/subscriptions/subscription/resourceGroups/group/providers"
        home += "/Microsoft.MachineLearningServices/registries/azureml"
        if host != MFE or not path.startswith(home):
            return None
        path = path.removeprefix(home)
        if path == "/models/Desk-1":
            return {"id": "x", "name": "Desk-1", "properties": {"latestVersion": foundry.versions[-1]}}
        if path == "/models/Desk-1/versions":
            return {"value": [self.version(version) for version in reversed(foundry.versions)]}
        for version in foundry.versions:
            if path == f"/models/Desk-1/versions/{version}":
                return self.version(version)
            if path == f"/datarefs/Desk-1/versions/{version}" and self.command == "POST":
                foundry.signed += 1
                foundry.signature = f"s{foundry.signed}"
                address = f"https://{STORE}/box?sv=2021-10-04&sr=c&sp=rl&sig={foundry.signature}"
                credential = {"credentialType": "SAS", "sasUri": address}
                where = {"blobUri": f"https://{STORE}/box", "storageAccountArmId": "y", "credential": credential}
                return {"blobReferenceForConsumption": where}
        return None

    def version(self, version: str) -> dict[str, Any]:
        foundry: Foundry = self.server.hub
        return {
            "id": f"azureml://registries/azureml/models/Desk-1/versions/{version}", "name": version, "type": "models",
            "properties": {
                "modelType": "custom_model", "modelUri": f"https://{STORE}/box/a/folder", "isArchived": False, "isAnonymous": False,
                "tags": foundry.tags, "properties": {}, "description": "A model for desks.", "flavors": {},
            },
            "systemData": {"createdAt": "2026-01-01T00:00:00Z", "createdBy": "Acme", "createdByType": "User"},
        }  # fmt: skip

    def store(self, path: str, query: Mapping[str, str]) -> None:
        foundry: Foundry = self.server.hub
        if query.get("sig") != foundry.signature:
            return self.answer(403, b"", x_ms_error_code="AuthenticationFailed")
        if query.get("comp") == "list":
            body = self.listed(query.get("prefix", "")).encode()
            return self.body("", body, 0, len(body), 200, Content_Type="application/xml")
        name = path.removeprefix("/box/a/folder/")
        body = foundry.files.get(name)
        if body is None:
            return self.answer(404, b"", x_ms_error_code="BlobNotFound")
        if self.headers.get("If-Match", foundry.etag) != foundry.etag:
            return self.answer(412, b"", x_ms_error_code="ConditionNotMet")
        first, _, last = (self.headers.get("x-ms-range") or self.headers["Range"]).removeprefix("bytes=").partition("-")
        start, stop = int(first), min(len(body), int(last) + 1)
        summed = {}
        if self.headers.get("x-ms-range-get-content-md5") == "true" and name not in foundry.bare:
            summed["Content_MD5"] = base64.b64encode(hashlib.md5(body[start:stop]).digest()).decode()
        self.body(
            name, body, start, stop, 206, Content_Range=f"bytes {start}-{stop - 1}/{len(body)}", ETag=foundry.etag,
            Content_Type="application/octet-stream", x_ms_blob_type="BlockBlob", Last_Modified="Thu, 01 Jan 2026 00:00:00 GMT", **summed,
        )  # fmt: skip

    def listed(self, prefix: str) -> str:
        foundry: Foundry = self.server.hub
        blobs = {f"a/folder/{name}": body for name, body in foundry.files.items()} | {"a/folder2/other.json": b"{}"}
        rows = [
            "<Blob><Name>a/folder</Name><Properties><Content-Length>0</Content-Length><Etag>0x1</Etag>"
            "<BlobType>BlockBlob</BlobType></Properties><Metadata><hdi_isfolder>true</hdi_isfolder></Metadata></Blob>"
        ]
        for name, body in blobs.items():
            if name.startswith(prefix):
                summed = base64.b64encode(hashlib.md5(body).digest()).decode()
                stated = (
                    "" if name.removeprefix("a/folder/") in foundry.unsummed else f"<Content-MD5>{summed}</Content-MD5>"
                )
                rows.append(
                    f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>Thu, 01 Jan 2026 00:00:00 GMT</Last-Modified>"
                    f"<Etag>{foundry.etag}</Etag><Content-Length>{len(body)}</Content-Length>"
                    f"<Content-Type>application/octet-stream</Content-Type>{stated}<BlobType>BlockBlob</BlobType></Properties></Blob>"
                )
        address = f'ServiceEndpoint="https://{STORE}/" ContainerName="box"'
        inner = f"<Blobs>{''.join(rows)}</Blobs><NextMarker/>"
        return f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults {address}>{inner}</EnumerationResults>'
