"""A store in a local folder: blobs by their digest, artifacts as read-only folders of hard links to them.

    blobs/ab/abcdef…          one file's bytes
    artifacts/<hex>.json      kind, files and the stamps that say whether a file was touched since
    trees/<hex>/…             the artifact as a folder, ready to be read by any library

Promises: an artifact is there whole or not at all; what `path` returns has the recorded bytes (a file whose stamp
changed is read again and compared); putting the same content twice stores it once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from slmops.core.artifact import Artifact, FileEntry
from slmops.core.digest import digest_file
from slmops.errors import IntegrityError
from slmops.store.files import disk_error, fsync_folder, read_json, remove_tree, write_json


def scan(folder: Path, kind: str) -> Artifact:
    """The artifact that a folder is. Symbolic links and special files are an IntegrityError."""
    entries = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise IntegrityError(f"{path} is neither a file nor a folder", "artifacts hold plain files only")
        if path.is_file():
            entries.append(FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, digest_file(path)))
    return Artifact(kind, tuple(sorted(entries, key=lambda entry: entry.path)))


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


class Store:
    """See the module. `root` is made on first use."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _tree(self, digest: str) -> Path:
        return self.root / "trees" / _hex(digest)

    def _record(self, digest: str) -> Path:
        return self.root / "artifacts" / f"{_hex(digest)}.json"

    def _blob(self, digest: str) -> Path:
        value = _hex(digest)
        return self.root / "blobs" / value[:2] / value

    def put(self, folder: Path, kind: str) -> Artifact:
        """Take a folder's files into the store (they are moved out of `folder`).

        Raises:
            ResourceError: no space; nothing half-written becomes visible.
        """
        artifact = scan(folder, kind)
        try:
            self._take(folder, artifact)
        except OSError as error:
            raise disk_error(error, self.root) from error
        return artifact

    def _take(self, folder: Path, artifact: Artifact) -> None:
        trees = self.root / "trees"
        trees.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=trees))
        for entry in artifact.files:
            blob = self._blob(entry.digest)
            source = folder / entry.path
            if blob.exists() and digest_file(blob) != entry.digest:
                blob.unlink()  # damaged since it was written
            if not blob.exists():
                blob.parent.mkdir(parents=True, exist_ok=True)
                with source.open("rb") as file:
                    os.fsync(file.fileno())
                source.chmod(0o444)
                source.replace(blob)
            target = fresh / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(blob, target)
            except OSError:
                shutil.copyfile(blob, target)
                target.chmod(0o444)
        tree = self._tree(artifact.digest)
        if self.has(artifact.digest):
            remove_tree(fresh)
            return
        remove_tree(tree)
        fresh.chmod(0o755)
        fresh.replace(tree)
        fsync_folder(trees)
        write_json(self._record(artifact.digest), artifact.to_json() | {"stamps": self._stamps(artifact)})

    def _stamps(self, artifact: Artifact) -> list[list[int]]:
        tree = self._tree(artifact.digest)
        stats = [(tree / entry.path).stat() for entry in artifact.files]
        return [[stat.st_size, stat.st_mtime_ns] for stat in stats]

    def artifact(self, digest: str) -> Artifact:
        """What an artifact is made of.

        Raises:
            IntegrityError: it is not in the store.
        """
        record = read_json(self._record(digest))
        if record is None or not self._tree(digest).is_dir():
            raise IntegrityError(f"artifact {digest[7:19]} is not in the store", "run `slmops run`: it is made again")
        return Artifact.from_json(record)

    def has(self, digest: str) -> bool:
        """Whether the artifact is there with untouched stamps; damage is found here before anything is built on it."""
        record = read_json(self._record(digest))
        if record is None:
            return False
        try:
            return bool(self._stamps(Artifact.from_json(record)) == record["stamps"])
        except FileNotFoundError:
            return False

    def path(self, digest: str) -> Path:
        """The artifact's folder, verified.

        Raises:
            IntegrityError: a file is missing or has other bytes than recorded.
        """
        artifact = self.artifact(digest)
        if not self.has(digest):
            broken = self.damaged(digest)
            if broken:
                raise IntegrityError(
                    f"{', '.join(broken)} in artifact {digest[7:19]} changed since slmops wrote it",
                    "run `slmops cache verify --repair`, then `slmops run`",
                )
            write_json(self._record(digest), artifact.to_json() | {"stamps": self._stamps(artifact)})
        return self._tree(digest)

    def damaged(self, digest: str) -> list[str]:
        """Paths of files that are missing or have other bytes than recorded (every byte is read)."""
        tree = self._tree(digest)
        return [
            entry.path
            for entry in self.artifact(digest).files
            if not (tree / entry.path).is_file() or digest_file(tree / entry.path) != entry.digest
        ]

    def digests(self) -> list[str]:
        """All artifacts, by digest."""
        folder = self.root / "artifacts"
        return sorted(f"sha256:{path.stem}" for path in folder.glob("*.json")) if folder.is_dir() else []

    def remove(self, digest: str) -> None:
        """Forget a damaged artifact, and those of its blobs whose bytes are not what their name says."""
        entries = self.artifact(digest).files
        self._record(digest).unlink(missing_ok=True)
        remove_tree(self._tree(digest))
        for entry in entries:
            blob = self._blob(entry.digest)
            if blob.is_file() and digest_file(blob) != entry.digest:
                blob.unlink()

    def gc(self, keep: Iterable[str]) -> tuple[int, int]:
        """Remove all artifacts but `keep`, and every blob no artifact uses. Returns (artifacts removed, bytes freed)."""
        kept = set(keep)
        removed = [digest for digest in self.digests() if digest not in kept]
        for digest in removed:
            self._record(digest).unlink(missing_ok=True)
            remove_tree(self._tree(digest))
        trees = self.root / "trees"
        for tree in trees.iterdir() if trees.is_dir() else ():
            if not self._record(f"sha256:{tree.name}").exists():
                remove_tree(tree)
        needed = {_hex(entry.digest) for digest in self.digests() for entry in self.artifact(digest).files}
        freed = 0
        for blob in (self.root / "blobs").glob("*/*"):
            if blob.name not in needed:
                freed += blob.stat().st_size
                blob.unlink()
        return len(removed), freed
