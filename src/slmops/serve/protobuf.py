"""The fields of a message of protocol buffers, for files of ONNX of which few are needed: without the packages `onnx` and `protobuf`."""

from __future__ import annotations

from collections.abc import Iterator

Field = tuple[int, int | memoryview]


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of variable length, and where the next one begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def fields(data: memoryview) -> Iterator[Field]:
    """The fields of a message: numbers, or the bytes of what has a length. Those of fixed width are passed over.

    Raises:
        ValueError, IndexError: it is not such a message.
    """
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = varint(data, at)
            yield tag >> 3, value
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            length, at = varint(data, at)
            if at + length > len(data):
                raise ValueError("it ends too early")
            yield tag >> 3, data[at : at + length]
            at += length
        else:
            raise ValueError("not a message of protobuf")
