"""A tar archive taken apart into files by their checksums.

Promises: nothing is written under a name of the archive. Links, devices, sparse files and unsafe names are refused by name, and so is
an archive that unpacks to more than `GROWTH` times its size. Memory stays small whatever its headers say; the archive is read once
from its beginning, so that a packed one of any size takes no room but that of its files.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

from slmops.catalog.check import AGAIN, GROWTH
from slmops.catalog.hub import File
from slmops.catalog.source import LONGEST_NAME, MOST_FILES, refusal
from slmops.errors import RefusedError

PACKINGS = ("tar", "tar+gzip")
ALLOWANCE = 1 << 20
"""Bytes that any archive may unpack to."""
LARGEST_HEADER = 1 << 20
_BLOCK = 1 << 20
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}


def unpack(
    blob: Path, packing: str, into: Path, name: str, room: Callable[[int], None] = lambda size: None
) -> list[File]:
    """Write the files of an archive to `into`, each named by its SHA-256.

    Args:
        name: how messages call the archive.
        room: asked before each file with its size; raises where the disk has no room.

    Raises:
        RefusedError: what it holds, or that it is damaged.
    """
    refuse_packing(packing, name)
    try:
        with blob.open("rb") as raw:
            if packing == "tar":
                return _members(raw, blob, into, name, room)
            with gzip.GzipFile(fileobj=raw) as stream:
                return _members(stream, blob, into, name, room)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RefusedError(f"{name}: its archive is damaged: {error}", AGAIN) from None


def refuse_packing(packing: str, name: str) -> None:
    """Refuse what is not unpacked here.

    Raises:
        RefusedError: with what is.
    """
    if packing not in PACKINGS:
        raise RefusedError(
            f"{name}: packed as {packing!r:.40}, which is not unpacked", f"push it as {' or '.join(PACKINGS)}"
        )


def _members(
    stream: IO[bytes] | gzip.GzipFile, blob: Path, into: Path, name: str, room: Callable[[int], None]
) -> list[File]:
    most = GROWTH * blob.stat().st_size + ALLOWANCE
    files: list[File] = []
    total = headers = 0
    long: dict[str, str] = {}
    while True:
        head = stream.read(512)
        if not head.strip(b"\0"):
            stream.read(_BLOCK)  # the checksum of a packed archive stands at its end
            return files
        size, kind, member = _header(head, name)
        headers += 1
        if headers > 4 * MOST_FILES or len(files) > MOST_FILES:
            raise RefusedError(f"{name}: more than {MOST_FILES} files in it, where a model has a few", AGAIN)
        if kind in b"xgLK":
            if size > LARGEST_HEADER:
                raise RefusedError(f"{name}: refused for a header of {size} bytes in its archive", AGAIN)
            body = _exactly(stream, size + -size % 512, name)[:size]
            total += len(body)
            if kind == b"L":
                long["path"] = _text(body.rstrip(b"\0"))
            elif kind == b"x":
                long |= _records(body, name)
        else:
            member = long.get("path", member)
            size = _number(long["size"], name, 10) if "size" in long else size
            sparse = any(key.startswith("GNU.sparse") for key in long)
            long = {}
            member = _safe(member, name)
            total += size
            if total > most:
                raise RefusedError(
                    f"{name}: refused as an archive bomb at {member}: {blob.stat().st_size} bytes that unpack to over {most}",
                    AGAIN,
                )
            if kind == b"5" or (member.endswith("/") and kind in b"0\0"):
                continue
            if kind not in b"0\x007" or sparse:
                what = "a sparse file" if sparse else _KINDS.get(kind, f"an entry of kind {kind!r}")
                raise RefusedError(f"{name}: refused for {member!a}: {what} in its archive", AGAIN)
            room(size)
            files.append(_write(stream, size, member, into, name))
        if total > most:
            raise RefusedError(
                f"{name}: refused as an archive bomb: {blob.stat().st_size} bytes that unpack to {total}", AGAIN
            )


def _write(stream: IO[bytes] | gzip.GzipFile, size: int, member: str, into: Path, name: str) -> File:
    made, left, path = hashlib.sha256(), size, into / "unpacking"
    with path.open("wb") as file:
        while left:
            chunk = _exactly(stream, min(left, _BLOCK), name)
            made.update(chunk)
            file.write(chunk)
            left -= len(chunk)
    _exactly(stream, -size % 512, name)
    path.replace(into / made.hexdigest())
    return File(member, size, "sha256", made.hexdigest())


def _safe(member: str, name: str) -> str:
    while member.startswith("./"):
        member = member[2:]
    if member in ("", "."):
        return "/"
    reason = refusal(member.rstrip("/") or "/")
    if reason:
        raise RefusedError(f"{name}: refused for {ascii(member)[:LONGEST_NAME]:.90} in its archive: {reason}", AGAIN)
    return member


def _exactly(stream: IO[bytes] | gzip.GzipFile, count: int, name: str) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise RefusedError(f"{name}: its archive ends in the middle of a file", AGAIN)
    return data


def _header(head: bytes, name: str) -> tuple[int, bytes, str]:
    """Size, kind and name of an entry."""
    if len(head) < 512 or sum(head) - sum(head[148:156]) + 8 * 32 != _number(_text(head[148:156]), name):
        raise RefusedError(f"{name}: its archive is damaged: no tar header where one must be", AGAIN)
    member = _text(head[:100].partition(b"\0")[0])
    if head[257:263] == b"ustar\0" and head[345]:
        prefix = _text(head[345:500].partition(b"\0")[0])
        member = f"{prefix}/{member}"
    field = head[124:136]
    size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _number(_text(field), name)
    return size, head[156:157], member


def _number(text: str, name: str, base: int = 8) -> int:
    digits = text.strip(" \0") or "0"
    if not digits.isascii() or not digits.isdecimal() or len(digits) > 20 or (base == 8 and set(digits) & {"8", "9"}):
        raise RefusedError(f"{name}: its archive is damaged: {digits!r:.30} is no number", AGAIN)
    return int(digits, base)


def _records(body: bytes, name: str) -> dict[str, str]:
    """Entries of an extended header: `LENGTH KEY=VALUE` and a new line each."""
    found = {}
    at = 0
    while at < len(body):
        digits = body[at : at + 20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = body[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if not equals or at + length > len(body):
            raise RefusedError(f"{name}: its archive is damaged: an extended header that is none", AGAIN)
        found[_text(key)] = _text(value)
        at += length
    return found


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
