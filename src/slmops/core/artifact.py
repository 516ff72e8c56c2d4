"""Artifacts: folders known by their content.

Law: two folders with the same relative file names and the same bytes have the same digest, wherever and whenever they
were made. Times, permissions and the facts of the run that made them are not part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slmops.core.digest import digest_json


@dataclass(frozen=True)
class FileEntry:
    """One file: its path with `/`, its size in bytes and its digest."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Artifact:
    """A kind (dataset, model, …) and files sorted by path."""

    kind: str
    files: tuple[FileEntry, ...]

    @property
    def digest(self) -> str:
        """Digest over kind, paths, sizes and file digests."""
        return digest_json(self.to_json())

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """The canonical form that is digested and stored."""
        return {"kind": self.kind, "files": [[f.path, f.size, f.digest] for f in self.files]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Artifact:
        """Inverse of `to_json`."""
        return cls(value["kind"], tuple(FileEntry(*entry) for entry in value["files"]))
