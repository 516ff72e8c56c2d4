"""Bytes by checksum, and the folder that is made of them by name.

Promises: what is in the making is found again by its checksums after a kill; what a service states by something else than SHA-256 is
known by SHA-256 from here on, and what comes in archives by the SHA-256 of each file in them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from slmops.catalog.check import AGAIN
from slmops.catalog.hub import File, Listing
from slmops.catalog.source import MOST_FILES, refuse_names
from slmops.catalog.transfer import disk, refuse_full
from slmops.catalog.unpack import unpack
from slmops.errors import RefusedError
from slmops.store.files import remove_tree


def recover(files: Sequence[File], stage: Path) -> None:
    """Take a folder in the making apart again, so that its bytes are found by their checksums."""
    blobs = stage / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    for file in files:
        if (stage / "tree" / file.name).is_file() and not (blobs / file.digest).exists():
            (stage / "tree" / file.name).replace(blobs / file.digest)
    remove_tree(stage / "tree")


def build(files: Sequence[File], stage: Path) -> Path:
    """A folder of the files in `stage`, by name. Bytes of several names are copied."""
    tree = stage / "tree"
    remove_tree(tree)
    tree.mkdir(parents=True)
    last = {file.digest: file.name for file in files}
    for file in files:
        path = tree / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if last[file.digest] == file.name:
            (stage / "blobs" / file.digest).replace(path)
        else:
            shutil.copyfile(stage / "blobs" / file.digest, path)
    return tree


def sealed(files: Sequence[File], blobs: Path, model: str) -> tuple[tuple[File, ...], dict[str, str]]:
    """The files by SHA-256 or git's checksum, and what the service stated instead, by which they are found again."""
    made: list[File] = []
    stated = {}
    for file in files:
        if file.kind in ("md5", "etag"):
            path = blobs / file.digest
            new = File(file.name, file.size, "sha256", File(file.name, file.size, "sha256", "").of(path))
            stated[new.digest] = file.digest
            if not (blobs / new.digest).exists():
                link(path, blobs / new.digest, model)
            file = new
        made.append(file)
    return tuple(made), stated


def link(path: Path, other: Path, model: str) -> None:
    """The same bytes under another name, as a copy where there are no links. A copy gets its name when it is whole.

    Raises:
        ResourceError: no room for a copy.
    """
    try:
        os.link(path, other)
    except OSError:
        refuse_full(other.parent, path.stat().st_size, model)
        copy = other.with_name(f"{other.name}.copy")
        shutil.copyfile(path, copy)
        with copy.open("rb") as stream:
            os.fsync(stream.fileno())
        copy.replace(other)


def opened(listing: Listing, files: Sequence[File], blobs: Path) -> list[File]:
    """The files, with those of archives in their place, which go to `blobs` too.

    Raises:
        RefusedError: an archive holds what no model needs, or two files have one name.
        ResourceError: no room for them.
    """
    model = str(listing.source)
    found: list[File] = []
    seen: set[tuple[str, str]] = set()
    for file in files:
        if len(found) > MOST_FILES:
            raise RefusedError(f"{model}: more than {MOST_FILES} files, where a model has a few", AGAIN)
        archive = listing.archives.get(file.name)
        if archive is None:
            found.append(file)
            continue
        if (file.digest, archive.packing) in seen:
            continue  # the same files again
        seen.add((file.digest, archive.packing))
        called = f"{model}: {file.name}"
        try:
            found += unpack(
                blobs / file.digest, archive.packing, blobs, called, lambda size: refuse_full(blobs, size, model)
            )
        except OSError as error:
            raise disk(error, listing, blobs) from error
    once = list({(file.name, file.digest): file for file in found}.values())
    refuse_names((file.name for file in once), model)
    return once
