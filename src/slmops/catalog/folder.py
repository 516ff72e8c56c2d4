"""A model in a folder of this machine, under the same rules as one on a hub.

Promises: links are followed only within the folder, or into the `blobs` of the hub cache that the folder is part of; any
other is refused by name. `commit` of its listing changes when a name, a size or a time of change does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Generator, Sequence
from pathlib import Path

from slmops.catalog.hub import File, Listing
from slmops.catalog.source import Source, refuse_names
from slmops.errors import ModelError, RefusedError

_BLOCK = 1 << 20


class Folder:
    """One folder, or one GGUF file in it."""

    def listing(self, source: Source) -> Listing:
        """The files that are there; their checksums are taken later, by `summed`.

        Raises:
            ModelError: nothing there, or a name or a link that leads out of the folder.
        """
        root, names = _names(source)
        refuse_names(names, source.name)
        _refuse_links(root, names, source.name)
        state = hashlib.sha256()
        files = []
        for name in sorted(names):
            stat = (root / name).stat()
            state.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
            files.append(File(name, stat.st_size, "sha256", ""))
        return Listing(source, state.hexdigest(), tuple(files), _licence(root), str(root))

    def summed(self, listing: Listing, files: Sequence[File]) -> tuple[File, ...]:
        """The files with their checksums."""
        root = Path(listing.endpoint)
        return tuple(dataclasses.replace(file, digest=file.of(root / file.name)) for file in files)

    def read(self, listing: Listing, file: File, start: int, stop: int) -> Generator[bytes, None, None]:
        """The bytes from `start` to before `stop`."""
        with (Path(listing.endpoint) / file.name).open("rb") as stream:
            stream.seek(start)
            while start < stop and (block := stream.read(min(_BLOCK, stop - start))):
                start += len(block)
                yield block


def _names(source: Source) -> tuple[Path, list[str]]:
    path = Path(source.name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is a file", "give the folder of the model; only a .gguf file is a whole model")
        return path.parent, [path.name]
    if not path.is_dir():
        raise ModelError(f"{path} is neither a folder nor a file", "give the folder of the model")
    names = []
    for base, folders, files in os.walk(path):
        here = Path(base)
        for folder in [folder for folder in folders if (here / folder).is_symlink()]:
            names.append((here / folder).relative_to(path).as_posix())
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        names += [(here / file).relative_to(path).as_posix() for file in files if not file.startswith(".")]
    return path, names


def _refuse_links(root: Path, names: Sequence[str], model: str) -> None:
    inside = [root.resolve()]
    if root.parent.name == "snapshots":
        inside.append(root.parent.parent.resolve() / "blobs")
    for name in names:
        path = root / name
        if path.is_symlink():
            target = path.resolve()
            if not target.is_file() or not any(target.is_relative_to(base) for base in inside):
                raise RefusedError(
                    f"{model}: refused for its file {name}: a symbolic link to {target}", "copy the file in its place"
                )
        elif not path.is_file():
            raise RefusedError(f"{model}: refused for {name}: neither a file nor a folder", "take it out of the folder")


def _licence(root: Path) -> str | None:
    """The licence that the model card states in its head."""
    try:
        with (root / "README.md").open(encoding="utf-8") as card:
            if card.readline().strip() != "---":
                return None
            for _ in range(200):
                line = card.readline()
                if not line or line.strip() == "---":
                    return None
                if line.startswith("license:"):
                    return line.partition(":")[2].strip() or None
    except (OSError, UnicodeDecodeError):
        return None
    return None
