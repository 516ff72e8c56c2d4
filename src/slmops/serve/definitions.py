"""Definitions: names that stand for a served model with a system text, a template and parameters of their own.

They lie in a folder, one file each, written whole or not at all, and are read when they are asked for: two servers may share the folder,
and they outlive both. A definition refers to a served model by its name and holds all else itself, so it does not change when the one that
it was made from does. Names are as in Ollama: `name` is `name:latest`, and capitals make no difference.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from slmops.errors import ModelError, ResourceError
from slmops.serve.scheduler import RequestError
from slmops.store.files import write_json

PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
NAME = re.compile(rf"(?:{PART}/){{0,2}}{PART}(?::{PART})?")
LATEST = ":latest"
LONGEST_FILE = 240
"""Bytes of a definition's file name: systems take 255, and one that is being written has more."""
MOST = 1000
"""Definitions of a folder, so that clients cannot fill the disk."""
LARGEST = 256 << 10
"""Bytes of one as JSON in UTF-8."""
LARGEST_ALL = 64 << 20
"""Bytes of all of a folder, which a server that lists them keeps in memory."""


class UnknownError(RequestError):
    """There is no model of a name."""


@dataclass(frozen=True)
class Definition:
    """A name and what it stands for.

    Attributes:
        name: with its tag.
        base: the name of the served model, with that of an adapter where it has one.
        parent: the name that it was made from.
        system: what conversations begin with that have no such text of their own.
        template: of prompts; "" is the model's own.
        licenses: texts.
        messages: role and content, which come before those of a conversation.
        parameters: options by Ollama's names, checked.
        modified: seconds since 1970.
    """

    name: str
    base: str
    parent: str = ""
    system: str = ""
    template: str = ""
    licenses: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    modified: float = 0.0

    def opened(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """A conversation with what this puts before it."""
        begin: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in self.messages]
        if self.system and not (messages and messages[0]["role"] == "system"):
            begin.insert(0, {"role": "system", "content": self.system})
        elif self.messages and messages and messages[0]["role"] == "system":
            return [messages[0], *begin, *messages[1:]]
        return [*begin, *messages]


def full(name: str) -> str:
    """A name with its tag.

    Raises:
        RequestError: no definition can have it.
    """
    if not NAME.fullmatch(name):
        raise RequestError(
            f"'{name[:200]}' is no name of a model", "letters, digits, _ . - are fine, and one : before a tag"
        )
    tagged = name if ":" in name else name + LATEST
    if len(_file_name(tagged)) > LONGEST_FILE:
        raise RequestError(f"'{name[:200]}' is too long for the name of a model", "give a shorter one")
    return tagged


def _file_name(name: str) -> str:
    return f"{quote(name.lower(), safe='')}.json"


def _is_name(name: str) -> bool:
    try:
        return bool(full(name))
    except RequestError:
        return False


def short(name: str) -> str:
    """A name without the tag that goes without saying."""
    return name.removesuffix(LATEST)


def folder() -> Path:
    """Where definitions lie that are not sent elsewhere: SLMOPS_DEFINITIONS, or `slmops/definitions` in the user's data folder."""
    own = os.environ.get("SLMOPS_DEFINITIONS")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_DATA_HOME") or ""
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "share") / "slmops" / "definitions"


class Definitions:
    """Those of a folder, which need not be there yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, tuple[tuple[int, int, int], Definition]] = {}

    def __iter__(self) -> Iterator[Definition]:
        """All that can be read, by name."""
        files = sorted(self.folder.glob("*.json"))
        for gone in self._known.keys() - set(files):
            del self._known[gone]
        for file in files:
            try:
                yield self._found(file)
            except (FileNotFoundError, ModelError):
                continue

    def get(self, name: str) -> Definition | None:
        """The one of a name, with or without its tag.

        Raises:
            ModelError: its file is damaged.
        """
        if not _is_name(name):
            return None
        try:
            return self._found(self._file(full(name)))
        except FileNotFoundError:
            return None

    def put(self, definition: Definition) -> None:
        """Keep one, in place of what had its name.

        Raises:
            RequestError: its name cannot be had, or it is too large.
            ResourceError: it cannot be written, or there are too many.
        """
        file = self._file(full(definition.name))
        row = asdict(replace(definition, modified=definition.modified or time.time()))
        size = len(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
        if size > LARGEST:
            raise RequestError(f"a definition has at most {LARGEST} bytes, this one {size}", "shorten its texts")
        others = [_size(other) for other in self.folder.glob("*.json") if other != file]
        if len(others) >= MOST and not file.exists():
            raise ResourceError(f"there are {MOST} definitions already", "delete some")
        if sum(others) + size > LARGEST_ALL:
            raise ResourceError(f"the definitions take {LARGEST_ALL} bytes already", "delete some")
        write_json(file, row)

    def delete(self, name: str) -> bool:
        """Forget one; whether it was there."""
        if not _is_name(name):
            return False
        try:
            self._file(full(name)).unlink()
        except FileNotFoundError:
            return False
        return True

    def _found(self, file: Path) -> Definition:
        """What a file holds, read again when it has changed."""
        try:
            stat = file.stat()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _damaged(file) from error
        mark = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        known = self._known.get(file)
        if known is None or known[0] != mark:
            known = self._known[file] = (mark, _read(file))
        return known[1]

    def _file(self, name: str) -> Path:
        return self.folder / _file_name(name)


def _read(file: Path) -> Definition:
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        row["messages"] = tuple((str(role), str(content)) for role, content in row["messages"])
        row["licenses"] = tuple(map(str, row["licenses"]))
        return Definition(**row)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file) from error


def _damaged(file: Path) -> ModelError:
    return ModelError(f"the definition in {file.name} cannot be read", "delete it and create it again")


def _size(file: Path) -> int:
    """Bytes; 0 if another server has deleted it."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
