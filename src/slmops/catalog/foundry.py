"""Azure AI Foundry: models of a registry, through its SDK (azure-ai-ml, azure-identity, azure-storage-blob).

Promises: the SDK says who the user is, what a model is and where it lies; its storage client reads ranges, so that a file goes on at any
byte (`models.download` of the SDK takes whole files into memory). Where the store states a file's MD5, that is checked over the whole
file; where it states none, as for many large files, every piece of 4 MB comes with an MD5 of the service that is checked before it is
written, and all pieces are of one version of the file (its ETag). What is kept is recorded by SHA-256.

The registry is `azureml`, whose models Foundry's catalogue shows, or the one that is named.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote, urlsplit

from slmops.catalog.hub import CUT, Again, File, Listing, patience, plain, refuse_offline, wait_of
from slmops.catalog.source import Source, flat, refuse_names
from slmops.errors import MissingExtraError, ModelError, RefusedError

PIECE = 4 << 20
"""Bytes of a piece: the most that the service gives an MD5 of."""
_PARTS = ("tokenizer", "config", "processor")
_ENTER = "run `az login`, or set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET"


@dataclass(frozen=True)
class _At:
    """Where a file lies in its container, and which version of it."""

    blob: str
    etag: str


class Foundry:
    """Registries of Azure Machine Learning. Methods may be called from several threads.

    Args:
        credential, transport: who asks, and what carries requests, if not the SDK's own.
    """

    def __init__(self, credential: Any = None, transport: Any = None, timeout: float | None = None) -> None:
        try:
            import azure.ai.ml
            import azure.identity
            import azure.storage.blob
        except ImportError as error:
            name = str(error.name or "azure-ai-ml")
            raise MissingExtraError("azure-ai-ml" if name.startswith("azure") else name, "azure") from None
        logging.getLogger("azure").setLevel(logging.CRITICAL)
        self.sdk: Any = azure
        self.credential = credential
        seconds = timeout or patience()
        self.options = {"retry_total": 0, "connection_timeout": seconds, "read_timeout": seconds}
        self.options |= {"transport": transport} if transport is not None else {}
        self.lock = threading.Lock()
        self.at: dict[str, _At] = {}
        self.clients: dict[str, Any] = {}
        self.container: Any = None
        self.model: Any = None

    def listing(self, source: Source) -> Listing:
        """The files of a version of a model; without one of the newest.

        Raises:
            Again: another try may help.
            ModelError: no such model or version, no access, or an unsafe name in it.
        """
        refuse_offline(source)
        registry, _, name = source.name.partition("/")
        try:
            models = self._client(registry).models
            wanted = {"version": source.revision} if source.revision else {"label": "latest"}
            model = models.get(name, **wanted)
            self.model = model
            self.container = self._open(registry, model)
            prefix = unquote(urlsplit(str(model.path)).path).strip("/").partition("/")[2].rstrip("/")
            blobs = list(self.container.list_blobs(name_starts_with=prefix, include=["metadata"]))
        except (Again, ModelError):
            raise
        except Exception as error:
            raise said(error, str(source)) from error
        found: dict[str, tuple[File, _At]] = {}
        for blob in blobs:
            inner = _inside(blob, prefix)
            if inner:
                refuse_names((inner,), str(source))
                found[inner] = (_file(inner, blob), _At(blob.name, str(blob.etag)))
        if not found:
            raise ModelError(
                f"{source}: Foundry lists this model but has no files of it", "it may be served only, not given out"
            )
        refuse_names(found, str(source))
        files, self.at = [], {}
        for inner, file in zip(found, arranged([file for file, _at in found.values()]), strict=True):
            files.append(file)
            self.at[file.name] = found[inner][1]
        state = sorted((at.blob, at.etag) for _file, at in found.values())
        commit = hashlib.sha256(repr((source.name, str(model.version), state)).encode()).hexdigest()
        tags = {**(model.properties or {}), **(model.tags or {})}
        about = ", ".join(str(tags[key]) for key in ("author", "task") if tags.get(key))
        return Listing(
            source, commit, tuple(files), plain(str(tags.get("license") or "")) or None,
            endpoint=f"registry {registry}", about=plain(f"version {model.version}{f', {about}' if about else ''}"),
            who="Azure", mirror="ask for another version",
        )  # fmt: skip

    def summed(self, listing: Listing, files: Sequence[File]) -> tuple[File, ...]:
        """The files as they are: checksums or versions come with the listing."""
        return tuple(files)

    def read(self, listing: Listing, file: File, start: int, stop: int) -> Generator[bytes, None, None]:
        """The bytes from `start` to before `stop` of a file, in pieces.

        Raises:
            Again, ModelError: as `listing`.
        """
        name, at = f"{listing.source}: {file.name}", self.at[file.name]
        where = self.container
        try:
            yield from self._pieces(where, at, file, start, stop)
        except (Again, ModelError):
            raise
        except Exception as error:
            if getattr(error, "status_code", None) != 403:
                raise said(error, name) from error
            with self.lock:  # the signature that opens the container may have ended
                if self.container is where:
                    self.container = self._again(listing.source, name)
            raise Again("the way into the store had ended") from error

    def _pieces(self, where: Any, at: _At, file: File, start: int, stop: int) -> Generator[bytes, None, None]:
        conditions = self.sdk.core.MatchConditions
        while start < stop:
            stream = where.get_blob_client(at.blob).download_blob(
                offset=start, length=min(PIECE, stop - start), validate_content=file.kind == "etag", max_concurrency=1,
                etag=at.etag, match_condition=conditions.IfNotModified,
                raw_response_hook=_refuse_unsummed if file.kind == "etag" else None,
            )  # fmt: skip
            piece = stream.readall()
            if not piece:
                raise Again(CUT)
            yield piece
            start += len(piece)

    def _client(self, registry: str) -> Any:
        if registry not in self.clients:
            credential = self.credential or self.sdk.identity.DefaultAzureCredential()
            self.clients[registry] = self.sdk.ai.ml.MLClient(
                credential, registry_name=registry, enable_telemetry=False, show_progress=False, **self.options
            )
        return self.clients[registry]

    def _open(self, registry: str, model: Any) -> Any:
        """The container in which a model lies, opened for a while."""
        from azure.ai.ml._utils import _registry_utils as utils  # the SDK has no public name for this

        models = self._client(registry).models
        address, _kind = utils.get_storage_details_for_registry_assets(
            service_client=models._registry_service_client, asset_type="models", asset_name=model.name, asset_version=model.version,
            rg_name=models._resource_group_name, reg_name=registry, uri=model.path,
        )  # fmt: skip
        return self.sdk.storage.blob.ContainerClient.from_container_url(
            address, max_single_get_size=PIECE, max_chunk_get_size=PIECE, **self.options
        )

    def _again(self, source: Source, name: str) -> Any:
        try:
            return self._open(source.name.partition("/")[0], self.model)
        except Exception as error:
            raise said(error, name) from error


def _refuse_unsummed(response: Any) -> None:
    """Refuse a piece that comes without an MD5: the SDK checks one that is there, and says nothing where none is."""
    answer = response.http_response
    if answer.status_code in (200, 206) and not answer.headers.get("Content-MD5"):
        raise Again("a piece came without its MD5")


def _inside(blob: Any, prefix: str) -> str:
    """The name of a blob below a folder; "" for what is not in it, and for entries that stand for folders."""
    folder = (blob.metadata or {}).get("hdi_isfolder") == "true"
    if folder or not (not prefix or blob.name == prefix or blob.name.startswith(f"{prefix}/")):
        return ""
    return str(blob.name[len(prefix) :].lstrip("/") or prefix.rpartition("/")[2])


def _file(name: str, blob: Any) -> File:
    summed = bytes(blob.content_settings.content_md5 or b"")
    if type(blob.size) is not int or blob.size < 0:
        raise RefusedError(f"{name}: the store states no size of it", "ask for another version")
    if len(summed) == 16:
        return File(name, blob.size, "md5", summed.hex())
    mark = f"{blob.container}\0{blob.name}\0{blob.size}\0{blob.etag}"
    return File(name, blob.size, "etag", hashlib.sha256(mark.encode()).hexdigest())


def arranged(files: Sequence[File]) -> list[File]:
    """The files where loaders look for them: MLflow's folders of weights, tokenizer and configuration become one, if no names meet."""
    made = list(flat(files)) if len(flat(files)) == len(files) else list(files)
    names = {file.name for file in made}
    for number, file in enumerate(made):
        folder, _, base = file.name.rpartition("/")
        if folder.rpartition("/")[2] in _PARTS and base not in names:
            made[number] = replace(file, name=base)
            names.add(base)
    return made


def said(error: BaseException, name: str) -> ModelError | Again:
    """What the SDK met, in our words. Its classes are told by name, as they differ between its parts."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    response = getattr(error, "response", None)
    status = int(getattr(error, "status_code", None) or getattr(response, "status_code", None) or 0)
    text = plain(re.sub(r"\s+", " ", str(getattr(error, "message", "") or error)))[:200]
    if "CredentialUnavailableError" in kinds or ("ClientAuthenticationError" in kinds and not status):
        return ModelError(f"{name}: nobody is logged in to Azure", _ENTER)
    if status == 401:
        return ModelError(f"{name}: Azure does not accept the login (401)", _ENTER)
    if status == 403:
        return ModelError(f"{name}: Azure refuses access (403)", "check what this account may read in the registry")
    if status == 404 or "ResourceNotFoundError" in kinds:
        return ModelError(
            f"{name}: Foundry has no such model or version", "check its name there; `slmops catalog --json` has some"
        )
    if status == 412:
        return ModelError(f"{name}: the file was changed on the way", "run again: the new version is fetched")
    if status == 416:
        return Again("the store has fewer bytes than it states")
    if status == 429:
        return Again("Azure asks for fewer requests (429)", wait_of(response) if response is not None else None)
    if status in (408, 425) or status >= 500:
        return Again(f"Azure is not well just now ({status})", wait_of(response) if response is not None else None)
    if "ServiceRequestError" in kinds:
        return Again("Azure cannot be reached", hint="check the network and proxies (HTTPS_PROXY)")
    if "ServiceResponseTimeoutError" in kinds:
        return Again("Azure fell silent")
    if kinds & {"ServiceResponseError", "IncompleteReadError", "StreamConsumedError", "ConnectionError", "OSError"}:
        return Again(CUT)
    if "MD5" in text or "hecksum" in text:
        return Again("wrong bytes came")
    return ModelError(f"{name}: Azure's SDK failed: {type(error).__name__}: {text}", "run again: what is here is kept")
