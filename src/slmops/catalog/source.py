"""What a user may name as a model to get, and what a repository may name as its files.

Promises: `parse` takes a name apart or refuses it with what to write instead; `refuse_names` refuses a listing that holds
a name which could lead out of a folder. Pure: nothing is read but whether a local path is there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slmops.errors import ModelError, RefusedError

if TYPE_CHECKING:
    from slmops.catalog.hub import File

HINT = "write hf:ORG/NAME or hf:ORG/NAME@REVISION"
OLLAMA_HINT = "write NAME:TAG, ollama:NAME, ollama:USER/NAME:TAG or hf.co/ORG/NAME:TAG"
OCI_HINT = "write oci:REGISTRY/REPOSITORY:TAG or oci:REGISTRY/REPOSITORY@sha256:…"
AZURE_HINT = "write azure:NAME, azure:NAME:VERSION or azure:REGISTRY/NAME:VERSION"
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"(?:hf:)?(?P<name>(?:{_PART}/)?{_PART})(?:@(?P<revision>[\w./-]+))?")
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_OLLAMA = re.compile(rf"(?:(?P<host>[\w.-]+(?::\d+)?)/)?(?:(?P<space>{_WORD})/)?(?P<name>{_WORD})(?::(?P<tag>{_TAG}))?")
_OCI = re.compile(
    rf"(?P<name>(?:http://|https://)?[\w.\[\]-]+(?::\d+)?(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)+)"
    rf"(?::(?P<tag>{_TAG}))?(?:@(?P<digest>sha256:[0-9a-f]{{64}}))?"
)
_AZURE = re.compile(rf"(?:(?P<registry>{_WORD})/)?(?P<name>{_WORD})(?::(?P<version>{_WORD}))?")
WEIGHTS = (".safetensors", ".gguf")
LONGEST_PART, LONGEST_NAME, MOST_FILES = 255, 1000, 20_000


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: ORG/NAME of a hub; a path of this machine; [HOST/]NAMESPACE/NAME of an Ollama library; REGISTRY/REPOSITORY;
            REGISTRY/NAME in Azure AI Foundry.
        revision: a branch, tag, commit, checksum (`sha256:…`) or version; None: what the service takes.
    """

    kind: Literal["hub", "path", "ollama", "oci", "azure"]
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        if self.kind == "path":
            return self.name
        mark = "@" if self.kind == "hub" or (self.revision or "").startswith("sha256:") else ":"
        shown = self.name.removeprefix("library/").removeprefix(f"{AZURE_REGISTRY}/" if self.kind == "azure" else "")
        return f"{SCHEMES[self.kind]}:{shown}{f'{mark}{self.revision}' if self.revision else ''}"


SCHEMES = {"hub": "hf", "ollama": "ollama", "oci": "oci", "azure": "azure"}
AZURE_REGISTRY = "azureml"


def parse(text: str) -> Source:
    """Take a name apart: `hf:ORG/NAME[@REVISION]`, ORG/NAME, a path, NAME:TAG or `ollama:…`, `oci:…`, `azure:…`. What is here goes first.

    A/B:TAG without a scheme is refused: it could be a user's of Ollama's library, or a repository of the hub.

    Raises:
        ModelError: it is none of these.
    """
    scheme, colon, rest = text.partition(":")
    if scheme == "hf" and colon:
        return hub(text)
    if colon and scheme in ("ollama", "oci", "azure"):
        return {"ollama": ollama, "oci": oci, "azure": azure}[scheme](rest, text)
    path = Path(text).expanduser()
    if text.startswith(("/", "./", "../", "~")) or text in (".", "..") or path.exists():
        if not path.exists():
            raise ModelError(f"{text} is not there", "check the path; a model on a hub is written hf:ORG/NAME")
        return Source("path", str(path.absolute()))
    if scheme in ("http", "https"):
        raise ModelError(f"{text} is an address", f"{HINT}; a registry's model is written oci:REGISTRY/REPOSITORY:TAG")
    first = text.partition("/")[0]
    if text.count("/") == 1 and colon and "@" not in text and not set(".:") & set(first) and _OLLAMA.fullmatch(text):
        raise ModelError(
            f"{text} may be a user's of Ollama's library or of the hub", f"write ollama:{text} or hf.co/{text}"
        )
    if (
        first in _HUGGING_FACE
        or first == "registry.ollama.ai"
        or (colon and "." not in first.partition(":")[0])
        or (colon and "/" not in text)
    ):
        return ollama(text, text)
    if "." in first and text.count("/") > 1:
        raise ModelError(f"{text} names a registry", f"write oci:{text}")
    if "/" not in text.partition("@")[0]:
        raise ModelError(f"{text} is neither a path nor ORG/NAME", HINT)
    return hub(text)


_HUGGING_FACE = ("hf.co", "huggingface.co")


def ollama(rest: str, text: str) -> Source:
    """Take a name of an Ollama library apart: NAME, NAME:TAG, USER/NAME:TAG, HOST/USER/NAME:TAG.

    Raises:
        ModelError: it has none of these forms.
    """
    match = _OLLAMA.fullmatch(rest)
    host, space = (match["host"], match["space"]) if match else (None, None)
    if match and host and not space and "." not in host and ":" not in host:
        host, space = None, host
    if not match or ".." in rest or "--" in rest or (host and not space):
        raise ModelError(f"{text} is not a name of Ollama's library", OLLAMA_HINT)
    name = f"{space or 'library'}/{match['name']}"
    if host and host != "registry.ollama.ai":
        name = f"{'hf.co' if host in _HUGGING_FACE else host}/{name}"
    return Source("ollama", name, match["tag"] or "latest")


def oci(rest: str, text: str) -> Source:
    """Take a name in a registry apart: REGISTRY/REPOSITORY with :TAG or @sha256:….

    Raises:
        ModelError: it has none of these forms.
    """
    match = _OCI.fullmatch(rest.removeprefix("//"))
    host = match["name"].removeprefix("http://").removeprefix("https://").partition("/")[0] if match else ""
    if not match or not (set(".:") & set(host) or host == "localhost"):
        raise ModelError(f"{text} is not the name of a model in a registry", OCI_HINT)
    return Source("oci", match["name"].removeprefix("https://"), match["digest"] or match["tag"] or "latest")


def azure(rest: str, text: str) -> Source:
    """Take a name in Azure AI Foundry apart: NAME, NAME:VERSION, REGISTRY/NAME:VERSION.

    Raises:
        ModelError: it has none of these forms.
    """
    match = _AZURE.fullmatch(rest)
    if not match:
        raise ModelError(f"{text} is not the name of a model in Azure AI Foundry", AZURE_HINT)
    return Source("azure", f"{match['registry'] or AZURE_REGISTRY}/{match['name']}", match["version"])


def hub(text: str) -> Source:
    """Take `hf:ORG/NAME[@REVISION]` apart.

    Raises:
        ModelError: it does not have that form.
    """
    match = _ID.fullmatch(text)
    name, revision = (match["name"], match["revision"]) if match else ("", None)
    wrong = not match or len(name) > 96 or ".." in name or "--" in name or name.endswith(".git")
    if wrong or (revision is not None and not _revision(revision)):
        raise ModelError(f"{text} is not the name of a model", HINT)
    return Source("hub", name, revision)


def _revision(text: str) -> bool:
    return ".." not in text and "//" not in text and not text.startswith(("/", "-", ".")) and not text.endswith("/")


def refusal(name: str) -> str | None:
    """Why a file of this name is not written, or None."""
    parts = name.split("/")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "an absolute name"
    if ".." in parts:
        return "`..` in a name leads out of the folder"
    if any(part in ("", ".") for part in parts):
        return "an empty part in a name"
    if any(part.lower() == ".git" for part in parts):
        return "a file of git itself"
    try:
        lengths = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        return "a name that is not Unicode"
    if "\\" in name or not name.isprintable():
        return "a backslash or a control character in a name"
    if max(lengths) > LONGEST_PART or sum(lengths) + len(parts) > LONGEST_NAME:
        return f"a name longer than {LONGEST_PART} bytes, or {LONGEST_NAME} with its folders"
    return None


def refuse_names(names: Iterable[str], model: str) -> None:
    """Refuse a listing that holds an unsafe name, also where that file would not be taken.

    Raises:
        RefusedError: with the first such name.
    """
    listing = list(names)
    if len(listing) > MOST_FILES:
        raise RefusedError(f"{model}: {len(listing)} files, where a model has a few", "check that this is a model")
    seen: set[str] = set()
    for name in listing:
        reason = refusal(name)
        if reason is None and name in seen:
            reason = "a name that comes twice"
        if reason is not None:
            raise RefusedError(f"{model}: refused for its file {_shown(name)}: {reason}", "do not use this repository")
        seen.add(name)
    for name in listing:
        for parent in (name[:at] for at, letter in enumerate(name) if letter == "/"):
            if parent in seen:
                raise RefusedError(
                    f"{model}: refused for {_shown(parent)}: both a file and a folder", "do not use this repository"
                )


def flat(files: Sequence[File]) -> tuple[File, ...]:
    """The files with those of the one folder that holds all weights in the top folder, as loaders want them."""
    homes = {file.name.rpartition("/")[0] for file in files if file.name.endswith(WEIGHTS)}
    home = next(iter(homes)) + "/" if len(homes) == 1 else "/"
    inner = {file.name.removeprefix(home) for file in files if file.name.startswith(home)}
    if home == "/" or home.startswith("adapter/"):
        return tuple(files)
    return tuple(
        dataclasses.replace(file, name=file.name.removeprefix(home)) for file in files
        if file.name.startswith(home) or file.name not in inner
    )  # fmt: skip


def _shown(name: str) -> str:
    text = ascii(name)
    return text if len(text) <= 90 else f"{text[:60]}…{text[-20:]}"
