"""A hub of models, over huggingface_hub: what a repository holds, and any bytes of a file of it.

Promises: every file comes with the size and the checksum that the hub states (SHA-256 of large files, git's SHA-1 of small
ones); a failure is `Again` where another try may help, and otherwise a `ModelError` that says what to do. The endpoint, the
token and proxies are those of huggingface_hub (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HTTPS_PROXY), read at each use.
Bodies are read here and not by `hf_hub_download`: that one starts anew after a cut process and compares sizes only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from slmops.catalog.source import Source, refuse_names
from slmops.errors import MissingExtraError, ModelError, UnreachableError

DEFAULT_ENDPOINT = "https://huggingface.co"
PATIENCE = 120.0
"""Seconds: a hub that asks for a longer pause is reported and not waited for."""
CUT = "the connection was cut"
MIRROR = "check HF_ENDPOINT, or use another mirror"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class File:
    """One file: where it stands in the repository, its bytes, and the checksum that they must have.

    Attributes:
        kind: `sha256` or `md5` of the content, or `git`: SHA-1 of `blob SIZE` NUL and the content, or `etag`: a mark of one version of
            it, whose pieces are checked as they come.
    """

    name: str
    size: int
    kind: Literal["sha256", "git", "md5", "etag"]
    digest: str

    def of(self, path: Path) -> str:
        """The checksum of this kind of the bytes at `path`; a mark of a version says nothing of them."""
        if self.kind == "etag":
            return self.digest
        if self.kind == "git":
            made = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        else:
            made = hashlib.sha256() if self.kind == "sha256" else hashlib.md5(usedforsecurity=False)
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                made.update(block)
        return made.hexdigest()


@dataclass(frozen=True)
class Archive:
    """How a file is packed (`tar`, `tar+gzip`), and whether it holds code."""

    packing: str
    code: bool = False


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit.

    Attributes:
        about: what its makers say of the model in a few words.
        archives: files that are unpacked when they are there.
        beside: files that are taken with any weights; `left`: those that are not, and why.
        who, mirror: the service and what helps if it fails, as messages name them.
    """

    source: Source
    commit: str
    files: tuple[File, ...]
    licence: str | None = None
    endpoint: str = ""
    gated: bool = False
    about: str = ""
    archives: Mapping[str, Archive] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()
    left: tuple[tuple[str, str], ...] = ()
    who: str = "the hub"
    mirror: str = "use another mirror (HF_ENDPOINT)"


class Again(Exception):
    """Another try may help; `wait`: seconds that the service asks for, or None; `hint`: what to do if no try does."""

    def __init__(self, reason: str, wait: float | None = None, hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.wait, self.hint = reason, wait, hint


class Origin(Protocol):
    """Where models come from: a hub, or a folder of this machine (`slmops.catalog.folder`)."""

    def listing(self, source: Source) -> Listing:
        """What is there."""

    def summed(self, listing: Listing, files: Sequence[File]) -> tuple[File, ...]:
        """Files with their checksums, where the listing leaves them out."""

    def read(self, listing: Listing, file: File, start: int, stop: int) -> Generator[bytes, None, None]:
        """The bytes from `start` to before `stop`, as they come."""


class Hub:
    """One hub. Methods may be called from several threads."""

    def __init__(self, endpoint: str | None = None, timeout: float | None = None) -> None:
        try:
            import huggingface_hub
        except ImportError:
            raise MissingExtraError("huggingface_hub", "hub") from None
        self.client = huggingface_hub
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self.shown = re.sub(r"//[^/@]*@", "//", self.endpoint)
        self.timeout = timeout or patience()

    def listing(self, source: Source) -> Listing:
        """The files of the repository at the commit that its revision names now.

        Raises:
            Again: another try may help.
            ModelError: no such repository or revision, no access, or an unsafe name in it.
        """
        refuse_offline(source)
        try:
            info = self.client.HfApi(endpoint=self.endpoint).model_info(
                source.name, revision=source.revision, files_metadata=True, timeout=self.timeout
            )
        except Exception as error:
            raise wrapped(error, str(source), self.shown) from error
        siblings = list(info.siblings or ())
        refuse_names((sibling.rfilename for sibling in siblings), str(source))
        commit = str(info.sha or "")
        if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
            raise ModelError(f"{source}: the hub does not say at which commit it is", "check HF_ENDPOINT")
        card = getattr(info, "card_data", None)
        tags = [str(tag) for tag in info.tags or ()]
        licence = (card.get("license_name") or card.get("license")) if card else None
        licence = licence or next((tag.partition(":")[2] for tag in tags if tag.startswith("license:")), None)
        licence = ", ".join(map(str, licence)) if isinstance(licence, list) else licence
        files = tuple(_file(sibling, str(source)) for sibling in siblings)
        return Listing(source, commit, files, plain(str(licence or "")) or None, self.shown, bool(info.gated))

    def read(self, listing: Listing, file: File, start: int, stop: int) -> Generator[bytes, None, None]:
        """The bytes from `start` to before `stop` of a file, as they come; they may end early or be too many.

        Raises:
            Again: another try may help.
            ModelError: the hub refuses, or does not serve parts of files.
        """
        name = f"{listing.source}: {file.name}"
        url = self.client.hf_hub_url(listing.source.name, file.name, revision=listing.commit, endpoint=self.endpoint)
        headers = self.client.utils.build_hf_headers()
        headers |= {"Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
        try:
            with self.client.get_session().stream(
                "GET", url, headers=headers, timeout=self.timeout, follow_redirects=True
            ) as response:
                if response.status_code >= 400:
                    response.read()
                self.client.utils.hf_raise_for_status(response)
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise ModelError(f"{name}: the hub compresses what it sends, which has no parts", MIRROR)
                skip = span(response, file, start, stop, name)
                yield from after(response.iter_raw(), skip)
        except (ModelError, Again):
            raise
        except Exception as error:
            raise wrapped(error, name, self.shown) from error

    def summed(self, listing: Listing, files: Sequence[File]) -> tuple[File, ...]:
        """The files as they are: the hub states all checksums."""
        return tuple(files)


def refuse_offline(source: Source) -> None:
    """Refuse to ask anybody where the user does not want it.

    Raises:
        UnreachableError: HF_HUB_OFFLINE is set, which holds for every service.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        said = _OFFLINE[0] if source.kind == "hub" else "nobody is asked"
        raise UnreachableError(f"{source}: {said}: HF_HUB_OFFLINE is set", _OFFLINE[1])


def patience() -> float:
    """Seconds of silence that are a failure."""
    return float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or 20)


def _file(sibling: Any, model: str) -> File:
    lfs = sibling.lfs
    digest = str((lfs["sha256"] if isinstance(lfs, dict) else lfs.sha256) if lfs else sibling.blob_id)
    wanted = r"[0-9a-f]{64}" if lfs else r"[0-9a-f]{40}"
    if not isinstance(sibling.size, int) or sibling.size < 0 or not re.fullmatch(wanted, digest):
        raise ModelError(f"{model}: the hub states no size or checksum of {sibling.rfilename}", MIRROR)
    return File(sibling.rfilename, sibling.size, "sha256" if lfs else "git", digest)


def span(response: Any, file: File, start: int, stop: int, name: str, hint: str = MIRROR, who: str = "the hub") -> int:
    """How many bytes of the body come before `start`.

    Raises:
        Again: these are other bytes than those asked for.
        ModelError: the whole of a large file comes each time.
    """
    if response.status_code == 206:
        said = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if not said or int(said[1]) != start or said[3] not in ("*", str(file.size)):
            raise Again(f"{who} sent other bytes than those asked for")
        return 0
    if response.status_code != 200:
        raise Again(f"{who} answered {response.status_code}")
    if stop < file.size:
        raise ModelError(f"{name}: {response.url.host} does not serve parts of files", hint)
    return start


def after(chunks: Iterator[bytes], skip: int) -> Iterator[bytes]:
    """The bytes without the first `skip`."""
    for chunk in chunks:
        if skip < len(chunk):
            yield chunk[skip:]
        skip = max(0, skip - len(chunk))


def wrapped(error: BaseException, name: str, endpoint: str = "") -> ModelError | Again:
    """What the hub's client met, in our words. Its HTTP library differs by version, so classes are told by name."""
    kinds: set[str] = set()
    walk: BaseException | None = error
    response = None
    while walk is not None:
        kinds |= {kind.__name__ for kind in type(walk).__mro__}
        response = response if response is not None else getattr(walk, "response", None)
        walk = walk.__cause__ or walk.__context__
    status = int(getattr(response, "status_code", 0) or 0)
    said = str(response.headers.get("X-Error-Message") or "") if response is not None else ""
    if status == 401 and ("nvalid" in said or "expired" in said):
        return ModelError(f"{name}: the hub does not accept the token", "set HF_TOKEN anew or run: hf auth login")
    for kind, message, hint in _KNOWN:
        if kind in kinds:
            return ModelError(f"{name}: {message}", hint)
    if status == 429:
        return Again("the hub asks for fewer requests (429)", wait_of(response))
    if status in (408, 425) or status >= 500:
        return Again(f"the hub is not well just now ({status})", wait_of(response))
    if status in (401, 403):
        return ModelError(f"{name}: the hub refuses access ({status})", "check what HF_TOKEN may read")
    if kinds & {"ConnectError", "ConnectTimeout", "ConnectionError", "UnsupportedProtocol", "ProxyError"}:
        return Again(f"the hub cannot be reached{f' at {endpoint}' if endpoint else ''}")
    if kinds & {"TransportError", "StreamError", "RequestException", "OSError"} and not status:
        return Again(CUT if "TimeoutException" not in kinds else "the hub fell silent")
    text = plain((str(error).strip().splitlines() or [type(error).__name__])[0])
    if kinds & {"JSONDecodeError", "KeyError", "TypeError", "ValueError"} and not status:
        return ModelError(f"{name}: {endpoint or 'the hub'} does not answer as a hub does: {text}", MIRROR)
    return ModelError(f"{name}: download failed: {text}", KEPT)


def given_up(again: Again, name: str) -> ModelError:
    """The error for who has tried often enough."""
    if "reached" in again.reason:
        return UnreachableError(f"{name}: {again.reason}", (again.hint or _OFFLINE[1]) + "; what is here is kept")
    if again.wait:
        return ModelError(f"{name}: {again.reason}", f"run again in {again.wait:.0f} s: what is here is kept")
    return ModelError(f"{name}: download failed: {again.reason}", KEPT)


def plain(text: str) -> str:
    """Foreign text without what a terminal would obey, and not endless."""
    return "".join(letter for letter in text if letter.isprintable())[:300]


def wait_of(response: Any) -> float | None:
    """Seconds that the hub asks for: Retry-After, or `t` of its RateLimit."""
    after = str(response.headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,6}(\.\d+)?", after):
        return float(after)
    if after:
        from datetime import UTC, datetime
        from email.utils import parsedate_to_datetime

        with contextlib.suppress(ValueError, TypeError):
            return max(0.0, (parsedate_to_datetime(after) - datetime.now(UTC)).total_seconds())
    limit = re.search(r"\br=0;\s*t=(\d{1,6})", str(response.headers.get("RateLimit") or ""))
    return float(limit[1]) if limit else None


KEPT = "run again: what is here is kept"
_OFFLINE = ("the hub cannot be reached", "check the network and HF_ENDPOINT, or give a local folder")
_KNOWN: tuple[tuple[str, str, str], ...] = (
    ("GatedRepoError", "the model is gated", "ask for access on its page, then set HF_TOKEN or run: hf auth login"),
    ("RepositoryNotFoundError", "the hub has no such model, or it needs a login", "check the name; set HF_TOKEN"),
    ("RevisionNotFoundError", "the model has no such revision", "check what stands after the @"),
    ("EntryNotFoundError", "the hub lists this file but does not have it", "run again, or tell the model's makers"),
    ("DisabledRepoError", "the hub has shut this model off", "see its page for the reason"),
    ("HFValidationError", "is not the name of a model", "write hf:ORG/NAME or hf:ORG/NAME@REVISION"),
    ("OfflineModeIsEnabled", *_OFFLINE),
    ("TooManyRedirects", "the hub redirects in a circle", MIRROR),
)
