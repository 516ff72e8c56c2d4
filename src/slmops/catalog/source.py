"""What a user may name as a model to get, and what a repository may name as its files.

Promises: `parse` takes a name apart or refuses it with what to write instead; `refuse_names` refuses a listing that holds
a name which could lead out of a folder. Pure: nothing is read but whether a local path is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slmops.errors import ModelError, RefusedError

HINT = "write hf:ORG/NAME or hf:ORG/NAME@REVISION"
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"(?:hf:)?(?P<name>(?:{_PART}/)?{_PART})(?:@(?P<revision>[\w./-]+))?")
_LATER = {
    "azure": "Azure AI Foundry is not fetched from yet",
    "oci": "OCI registries are not fetched from yet",
    "ollama": "Ollama's library is not fetched from yet",
}
LONGEST_PART, LONGEST_NAME, MOST_FILES = 255, 1000, 20_000


@dataclass(frozen=True)
class Source:
    """Where a model comes from: `name` is ORG/NAME of a hub, or a path of this machine."""

    kind: Literal["hub", "path"]
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf:{self.name}{f'@{self.revision}' if self.revision else ''}" if self.kind == "hub" else self.name


def parse(text: str) -> Source:
    """Take a name apart: `hf:ORG/NAME[@REVISION]`, ORG/NAME, or a path. A bare ORG/NAME that is a folder here is that folder.

    Raises:
        ModelError: it is none of these.
    """
    scheme, colon, _rest = text.partition(":")
    if scheme == "hf" and colon:
        return hub(text)
    if colon and scheme in _LATER:
        raise ModelError(f"{text}: {_LATER[scheme]}", "give hf:ORG/NAME of a Hugging Face hub, or a local path")
    path = Path(text).expanduser()
    if text.startswith(("/", "./", "../", "~")) or text in (".", "..") or path.exists():
        if not path.exists():
            raise ModelError(f"{text} is not there", "check the path; a model on a hub is written hf:ORG/NAME")
        return Source("path", str(path.absolute()))
    if colon and re.fullmatch(r"[\w.-]+(/[\w.-]+)?:[\w.-]+", text):
        raise ModelError(
            f"{text} looks like a name of Ollama's library, which is not fetched from yet",
            "give the model's name on a Hugging Face hub: hf:ORG/NAME",
        )
    if "/" not in text.partition("@")[0]:
        raise ModelError(f"{text} is neither a path nor ORG/NAME", HINT)
    return hub(text)


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


def _shown(name: str) -> str:
    text = ascii(name)
    return text if len(text) <= 90 else f"{text[:60]}…{text[-20:]}"
