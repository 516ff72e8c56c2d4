"""What the header of a GGUF file says, read without loading it: numbers of its metadata, lengths of its lists, sizes of its tensors."""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from slmops.errors import ModelError

WIDTHS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
MOST = 1 << 24


def read(file: Path) -> dict[str, float | str]:
    """Numbers and texts by key; of a list of numbers the largest, and under `KEY#` how many entries a list has.

    Raises:
        ModelError: the file is not GGUF.
    """
    with _opened(file) as stream:
        return _metadata(stream)[1]


def counted(file: Path) -> tuple[int, dict[str, float | str]]:
    """How many numbers its tensors have together, and what `read` gives.

    Raises:
        ModelError: the file is not GGUF.
    """
    with _opened(file) as stream:
        tensors, about = _metadata(stream)
        found = 0
        for _ in range(_bounded(tensors)):
            _text(stream)
            shape = [int(_number(stream, "Q")) for _ in range(_bounded(_number(stream, "I")))]
            found += math.prod(shape)
            stream.seek(struct.calcsize("<IQ"), 1)  # its type and place
        return found, about


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        with file.open("rb") as stream:
            yield stream
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ModelError(f"{file} cannot be read as GGUF: {error}", "convert the model again") from error


def _metadata(stream: BinaryIO) -> tuple[float, dict[str, float | str]]:
    """How many tensors there are, and what `read` gives; the stream is at the tensors then."""
    found: dict[str, float | str] = {}
    if stream.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    _version, tensors, entries = _number(stream, "I"), _number(stream, "Q"), _number(stream, "Q")
    for _ in range(_bounded(entries)):
        key = _text(stream)
        kind = int(_number(stream, "I"))
        if kind != LIST:
            found[key] = _text(stream) if kind == TEXT else _number(stream, WIDTHS[kind])
            continue
        kind, count = int(_number(stream, "I")), _bounded(_number(stream, "Q"))
        found[f"{key}#"] = count
        if kind == TEXT:
            for _ in range(count):
                stream.seek(_bounded(_number(stream, "Q")), 1)
        else:
            size = struct.calcsize(WIDTHS[kind])
            values = struct.unpack(f"<{count}{WIDTHS[kind]}", stream.read(size * count))
            if values:
                found[key] = max(values)
    return tensors, found


def _number(stream: BinaryIO, kind: str) -> float:
    found: float = struct.unpack(f"<{kind}", stream.read(struct.calcsize(kind)))[0]
    return found


def _text(stream: BinaryIO) -> str:
    return stream.read(_bounded(_number(stream, "Q"))).decode("utf-8", "replace")


def _bounded(count: float) -> int:
    if count > MOST:
        raise ValueError("its header is damaged")
    return int(count)
