"""A registry that speaks OCI's distribution protocol: manifests, and any bytes of a blob.

Promises: a manifest that is asked for by its checksum has it, and every blob comes with the SHA-256 that its manifest states. A
login (`slmops.catalog.credentials`) goes to its registry and to the token service which that names, and never to where it redirects,
nor where there is no TLS but on this machine. What is read into memory is bounded, and so is the time that it may take.
A failure is `Again` where another try may help, and otherwise a `ModelError` that says what to do. What the layers of a manifest
are is left to `slmops.catalog.artifact` and `slmops.catalog.ollama`.

Specification: https://github.com/opencontainers/distribution-spec; tokens as https://distribution.github.io/distribution/spec/auth/token
has them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
import re
import ssl
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from slmops.catalog.credentials import DOCKER_HUB, Login, login
from slmops.catalog.hub import CUT, Again, File, Listing, after, patience, plain, span, wait_of
from slmops.errors import IntegrityError, ModelError, RefusedError

INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
LARGEST_MANIFEST, LARGEST_TOKEN = 4 << 20, 1 << 20
LARGEST_LAYER = 1 << 50
SLOWEST = 300.0
"""Seconds that a manifest, a small layer or a token may take to come."""
MOST_REDIRECTS = 10
_HOPS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class Place:
    """A repository: the registry's address, the repository's name in it, and the host as logins name it."""

    base: str
    repository: str
    host: str

    @property
    def shown(self) -> str:
        """The registry without a password."""
        return re.sub(r"//[^/@]*@", "//", self.base)


@dataclass(frozen=True)
class Blob:
    """What a manifest says of a blob."""

    media: str
    size: int
    digest: str
    notes: Mapping[str, str]


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read: its SHA-256, media type of the whole, configuration and layers."""

    digest: str
    kind: str
    config: Blob | None
    layers: tuple[Blob, ...]
    notes: Mapping[str, str]


@functools.cache
def _trusted() -> ssl.SSLContext:
    """Whose certificates are accepted; read once, which takes longer than a short answer."""
    return httpx.create_ssl_context()


class Client:
    """Asks registries. Methods may be called from several threads."""

    def __init__(self, timeout: float | None = None) -> None:
        self.http = httpx.Client(timeout=timeout or patience(), follow_redirects=False, verify=_trusted())
        self.tokens: dict[Place, str] = {}
        self.lock = threading.Lock()
        self.known: dict[str, bytes] = {}
        """Small blobs that were read already, or made here, by checksum."""

    def manifest(self, place: Place, reference: str, name: str) -> Manifest:
        """The manifest of a tag or checksum; of an index the one for this machine.

        Raises:
            Again: another try may help.
            IntegrityError: it was asked for by its checksum, and has another.
            ModelError: there is none, no access, or several to choose from.
        """
        said = self._manifest(place, reference, name)
        inner = said.get("manifests")
        if isinstance(inner, list):
            blob = _for_here(inner, name, said["digest"])
            said = self._manifest(place, f"sha256:{blob.digest}", name)
        if said.get("schemaVersion") != 2 or not isinstance(said.get("layers"), list):
            raise ModelError(
                f"{name}: its manifest is none of OCI or Docker's version 2", "push it again with a newer tool"
            )
        layers = tuple(_blob(entry, name) for entry in said["layers"])
        config = _blob(said["config"], name) if isinstance(said.get("config"), dict) else None
        kind = str(said.get("artifactType") or (config.media if config else ""))
        return Manifest(said["digest"], kind, config, layers, _notes(said))

    def _manifest(self, place: Place, reference: str, name: str) -> dict[str, Any]:
        with self._answer(
            place, f"manifests/{reference}", {"Accept": ", ".join((*MANIFESTS, *INDEXES))}, name
        ) as answer:
            body = _bounded(answer, LARGEST_MANIFEST, f"{name}: its manifest")
            stated = answer.headers.get("Docker-Content-Digest", "")
        digest = hashlib.sha256(body).hexdigest()
        if reference.startswith("sha256:") and reference != f"sha256:{digest}":
            raise IntegrityError(
                f"{name}: the manifest that came is not the one asked for (sha256 {reference[7:23]}…, not {digest[:16]}…)",
                "run again later, or use another registry",
            )
        if stated.startswith("sha256:") and stated != f"sha256:{digest}":
            raise Again("the manifest that came is not the one that the registry states")
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ModelError(f"{name}: {place.shown} does not answer as a registry does", "check the registry's name")
        return {**value, "digest": digest}

    def small(self, place: Place, blob: Blob, most: int, name: str) -> bytes:
        """A whole small blob; `read` does not ask for it again.

        Raises:
            Again, ModelError: as `manifest`.
        """
        if blob.size > most:
            raise RefusedError(
                f"{name}: {blob.size} bytes of {plain(blob.media)}, where a few are usual", "do not use this model"
            )
        if blob.digest not in self.known:
            with self._answer(place, f"blobs/sha256:{blob.digest}", {"Accept-Encoding": "identity"}, name) as answer:
                body = _bounded(answer, most, f"{name}: its {plain(blob.media)}")
            if hashlib.sha256(body).hexdigest() != blob.digest:
                raise Again("the bytes that came are not those that the registry states")
            self.known[blob.digest] = body
        return self.known[blob.digest]

    def keep(self, body: bytes) -> str:
        """Serve these bytes too; returns their checksum."""
        digest = hashlib.sha256(body).hexdigest()
        self.known[digest] = body
        return digest

    def read(self, place: Place, listing: Listing, file: File, start: int, stop: int) -> Generator[bytes, None, None]:
        """The bytes from `start` to before `stop` of a blob, as they come; they may end early or be too many.

        Raises:
            Again, ModelError: as `manifest`.
        """
        if file.digest in self.known:
            yield self.known[file.digest][start:stop]
            return
        name = f"{listing.source}: {file.name}"
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
        with self._answer(place, f"blobs/sha256:{file.digest}", headers, name) as answer:
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise ModelError(
                    f"{name}: the registry compresses what it sends, which has no parts", "use another registry"
                )
            skip = span(answer, file, start, stop, name, "use another registry", "the registry")
            with _words(place, name):
                yield from after(answer.iter_raw(), skip)

    @contextlib.contextmanager
    def _answer(self, place: Place, path: str, headers: Mapping[str, str], name: str) -> Iterator[httpx.Response]:
        """One good answer, after redirects and a login if one is asked for."""
        for last in (False, True):
            token = self.tokens.get(place)
            with _words(place, name):
                answer = self._follow(place, path, {**headers, **({"Authorization": token} if token else {})}, name)
            asks = answer.headers.get_list("WWW-Authenticate")
            if answer.status_code != 401 or last or not asks or answer.request.url.host != httpx.URL(place.base).host:
                break
            answer.close()
            with self.lock:
                if self.tokens.get(place) == token:
                    self.tokens[place] = self._token(place, asks, name)
        try:
            _raise_for(answer, place, path, name)
            yield answer
        except httpx.HTTPError as error:
            raise _transport(error, place, name) from error
        finally:
            answer.close()

    def _follow(self, place: Place, path: str, headers: Mapping[str, str], name: str) -> httpx.Response:
        request = self.http.build_request("GET", f"{place.base}/v2/{place.repository}/{path}", headers=dict(headers))
        home = request.url
        for _ in range(MOST_REDIRECTS):
            answer = self.http.send(request, stream=True)
            if answer.status_code not in _HOPS:
                return answer
            where = answer.next_request
            answer.close()
            if where is None:
                raise ModelError(f"{name}: the registry redirects to nowhere", "use another registry")
            if home.scheme == "https" and where.url.scheme != "https":
                raise ModelError(
                    f"{name}: the registry redirects to {where.url.host} without TLS", "use another registry"
                )
            if (where.url.scheme, where.url.host, where.url.port) != (home.scheme, home.host, home.port):
                where.headers.pop("Authorization", None)
                where.headers.pop("Cookie", None)
            request = where
        raise ModelError(f"{name}: the registry redirects in a circle", "run again later, or use another registry")

    def _token(self, place: Place, asks: Sequence[str], name: str) -> str:
        """What lets this client in, by one of the ways that the registry names."""
        own = login(place.host)
        withheld = own is not None and not _private(place.base)
        own = None if withheld else own
        for ask in asks:
            way, _, rest = ask.strip().partition(" ")
            said = {key.lower(): value for key, value in re.findall(r'(\w+)="([^"]*)"', rest)}
            if way.lower() == "bearer" and said.get("realm"):
                return f"Bearer {self._bearer(place, said, own, name, withheld)}"
            if way.lower() == "basic" and own and own.secret:
                return own.basic
        raise ModelError(f"{name}: the registry wants a login", _enter(place, withheld))

    def _bearer(self, place: Place, said: Mapping[str, str], own: Login | None, name: str, withheld: bool) -> str:
        with _words(place, name):
            realm = httpx.URL(said["realm"])
            private = _private(realm)
        if own and not private:
            own, withheld = None, True
        if realm.scheme != "https" and not place.base.startswith("http://"):
            raise ModelError(f"{name}: the registry wants a login at {realm.host} without TLS", "use another registry")
        asked = {"scope": said.get("scope") or f"repository:{place.repository}:pull"}
        if said.get("service"):
            asked["service"] = said["service"]
        headers = {"Accept-Encoding": "identity"}
        with _words(place, name):
            if own and own.identity:
                form = {**asked, "grant_type": "refresh_token", "client_id": "slmops", "refresh_token": own.identity}
                request = self.http.build_request("POST", realm, data=form, headers=headers)
            else:
                headers |= {"Authorization": own.basic} if own and own.secret else {}
                request = self.http.build_request("GET", realm.copy_merge_params(asked), headers=headers)
            with contextlib.closing(self.http.send(request, stream=True)) as answer:
                body = _bounded(answer, LARGEST_TOKEN, f"{name}: the answer of the registry's login")
        if answer.status_code == 429 or answer.status_code >= 500:
            raise Again(f"the registry's login is not well just now ({answer.status_code})", wait_of(answer))
        try:
            value = json.loads(body) if answer.status_code == 200 else {}
            token = value.get("token") or value.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            refused = (
                f"does not accept the login ({answer.status_code})"
                if own
                else f"gives no access ({answer.status_code})"
            )
            raise ModelError(f"{name}: the registry {refused}", f"check the name, and {_enter(place, withheld)}")
        return token


def _private(where: str | httpx.URL) -> bool:
    """Whether what is sent there is read by nobody on the way."""
    url = httpx.URL(where)
    return url.scheme == "https" or bool(re.fullmatch(r"localhost|127(\.\d+){3}|::1", url.host))


def _enter(place: Place, withheld: bool) -> str:
    if withheld:
        return "name the registry with TLS: the login to it is not sent without"
    return f"run: docker login {place.host}"


def place_of(host: str, repository: str) -> Place:
    """A repository of a host as users write it: without TLS on this machine alone, or where `http://` is written."""
    plainly = host.startswith("http://")
    host = host.removeprefix("http://").removeprefix("https://")
    if host in ("docker.io", DOCKER_HUB, "registry-1.docker.io"):
        repository = repository if "/" in repository else f"library/{repository}"
        return Place("https://registry-1.docker.io", repository, "docker.io")
    local = re.fullmatch(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", host)
    return Place(f"{'http' if plainly or local else 'https'}://{host}", repository, host)


def _for_here(entries: Sequence[Any], name: str, digest: str) -> Blob:
    """The manifest of an index that is for this machine: of its system and processor, or the only one."""
    systems = {"Linux": "linux", "Darwin": "darwin", "Windows": "windows"}
    machines = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64", "arm64": "arm64", "armv7l": "arm"}
    here = (systems.get(platform.system(), ""), machines.get(platform.machine(), ""))
    found: list[tuple[Any, Blob]] = []
    for entry in entries:
        blob = _blob(entry, name)
        said = entry.get("platform")
        which = (str(said.get("os")), str(said.get("architecture"))) if isinstance(said, dict) else None
        if which == ("unknown", "unknown") or blob.notes.get("vnd.docker.reference.type"):
            continue  # what vouches for another
        found.append((which, blob))
    match = [blob for which, blob in found if which == here] or [blob for which, blob in found if len(found) == 1]
    if len(match) == 1:
        return match[0]
    several = "".join(
        f"\n  @sha256:{blob.digest}  {plain('/'.join(which)) if which else plain(blob.notes.get('org.opencontainers.image.title', ''))}"
        for which, blob in found[:20]
    )
    raise ModelError(
        f"{name}: an index with {len(match)} of {len(found)} manifests for {'/'.join(here)}:{several}",
        "name one of them: oci:REGISTRY/REPOSITORY@sha256:…",
    )


def _blob(entry: Any, name: str) -> Blob:
    digest = str(entry.get("digest")) if isinstance(entry, dict) else ""
    size = entry.get("size") if isinstance(entry, dict) else None
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest) or type(size) is not int or not 0 <= size < LARGEST_LAYER:
        raise ModelError(
            f"{name}: its manifest states no possible size or no SHA-256 of a layer ({plain(digest)[:30]})",
            "push it again with a newer tool",
        )
    return Blob(str(entry.get("mediaType") or ""), size, digest[7:], _notes(entry))


def _notes(value: Mapping[str, Any]) -> dict[str, str]:
    notes = value.get("annotations")
    return {str(k): v for k, v in notes.items() if isinstance(v, str)} if isinstance(notes, dict) else {}


def _bounded(answer: httpx.Response, most: int, what: str) -> bytes:
    body, end = b"", time.monotonic() + SLOWEST
    for chunk in answer.iter_bytes():
        body += chunk
        if time.monotonic() > end:
            raise Again("the registry is too slow")
        if len(body) > most:
            raise RefusedError(f"{what} is longer than {most} bytes", "do not use this model")
    return body


@contextlib.contextmanager
def _words(place: Place, name: str) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # httpx leaves names of hosts to idna
        raise _transport(error, place, name) from error


def _transport(error: Exception, place: Place, name: str) -> Again | ModelError:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError | httpx.UnsupportedProtocol):
        tls = " (its TLS is not accepted)" if "SSL" in str(error) or "CERTIFICATE" in str(error) else ""
        return Again(
            f"the registry cannot be reached at {place.shown}{tls}",
            hint="check the network and the registry's name"
            + (" (one without TLS is written http://HOST)" if tls else ""),
        )
    if isinstance(error, httpx.TimeoutException):
        return Again("the registry fell silent")
    if isinstance(error, httpx.TransportError):
        return Again(CUT)
    return ModelError(
        f"{name}: {place.shown} does not answer as a registry does: {plain(str(error))}", "check the registry's name"
    )


def _raise_for(answer: httpx.Response, place: Place, path: str, name: str) -> None:
    status = answer.status_code
    if status in (200, 206):
        return
    if status == 429:
        raise Again("the registry asks for fewer requests (429)", wait_of(answer))
    if status in (408, 425) or status >= 500:
        raise Again(f"the registry is not well just now ({status})", wait_of(answer))
    if status in (401, 403):
        raise ModelError(
            f"{name}: the registry refuses access ({status})",
            f"check the name; a private one needs: docker login {place.host}",
        )
    if status == 404 and path.startswith("manifests/"):
        raise ModelError(
            f"{name}: the registry has no such model or tag", "check the name and what stands after the colon"
        )
    if status in (404, 410):
        raise ModelError(
            f"{name}: the registry lists this file but does not have it", "run again, or tell the model's makers"
        )
    if status == 416:
        raise Again("the registry has fewer bytes than it states")
    raise ModelError(f"{name}: the registry answered {status}", "check the registry's name")
