"""Small promises about files: a reader sees a whole file or none, whenever the writer is killed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slmops.errors import ResourceError, SlmopsError


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename.

    Raises:
        ResourceError: the disk is full; the old file, if any, is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        Path(name).unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON with sorted keys."""
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any | None:
    """The value of a JSON file, or None if the file is absent or was damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def disk_error(error: OSError, path: Path) -> SlmopsError:
    """A full disk or a missing permission, in words."""
    if error.errno in (28, 122):
        free = shutil.disk_usage(path.parent if path.parent.exists() else Path.cwd()).free
        return ResourceError(
            f"no space left on the disk that holds {path} ({free / 1e6:.0f} MB free)",
            "free some space (`slmops cache gc` removes what no current plan needs) and run again: finished steps are kept",
        )
    return SlmopsError(f"cannot write {path}: {error.strerror or error}", "check the permissions of the folder")


@contextlib.contextmanager
def exclusive(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file for the time of the block; the lock ends with the process, however it ends.

    Raises:
        SlmopsError: another process holds it; `busy` says what that means.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SlmopsError(busy, "wait until it has ended, or end it") from error
        yield


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file for the time of the block, after waiting for whoever holds it; the lock ends with the process.

    Args:
        waiting: called once before the wait, if there is one; what it raises is raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_tree(path: Path) -> None:
    """Remove a folder even where its files are read-only. Of a link only the link."""
    if path.is_symlink():
        path.unlink()
        return
    if not path.exists():
        return
    for root, _folders, _files in os.walk(path):
        Path(root).chmod(0o755)
    shutil.rmtree(path, ignore_errors=True)
