"""What a graph of ONNX says of its memory, read from the file without loading it: its inputs, its outputs and its tensors.

Only the few fields that are needed are read, by the numbers that onnx.proto3 gives them; the bytes of tensors are stepped over.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slmops.errors import ModelError

SIZES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""Bytes of a number by TensorProto.DataType; types that are not here count one byte."""
Field = tuple[int, int | memoryview]


@dataclass(frozen=True)
class Tensor:
    """A named tensor. `shape`: 0 where a length is not fixed; `item`: bytes of one number."""

    name: str
    shape: tuple[int, ...]
    item: int

    @property
    def bytes(self) -> int:
        """Of all its numbers."""
        size = self.item
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Graph:
    """`weights`: the tensors that the graph has itself."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]


def read(file: Path) -> Graph:
    """The facts of a graph.

    Raises:
        ModelError: the file is no graph.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    weights: list[Tensor] = []
    try:
        with file.open("rb") as opened:
            whole = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        for number, value in _fields(whole):
            if number != 7 or not isinstance(value, memoryview):  # ModelProto.graph
                continue
            for inner, said in _fields(value):
                if inner == 5 and isinstance(said, memoryview):
                    weights.append(_tensor(said))
                elif inner in (11, 12) and isinstance(said, memoryview):
                    (inputs if inner == 11 else outputs).append(_value(said))
    except (OSError, ValueError, IndexError) as error:
        raise ModelError(f"{file} cannot be read: {error}", "convert the model again") from error
    if not outputs:
        raise ModelError(f"{file} is no graph of ONNX", "convert the model again")
    return Graph(tuple(inputs), tuple(outputs), tuple(weights))


def _number(data: memoryview, at: int) -> tuple[int, int]:
    """A number of variable length, and where the next one begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: memoryview) -> Iterator[Field]:
    """The fields of a message: numbers, or the bytes of what has a length."""
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _number(data, at)
            yield tag >> 3, value
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            length, at = _number(data, at)
            if at + length > len(data):
                raise ValueError("it ends too early")
            yield tag >> 3, data[at : at + length]
            at += length
        else:
            raise ValueError("not a message of protobuf")


def _tensor(data: memoryview) -> Tensor:
    name, shape, kind = "", [], 0
    for number, value in _fields(data):
        if number == 1 and isinstance(value, int):
            shape.append(value)
        elif number == 1 and isinstance(value, memoryview):  # packed
            at = 0
            while at < len(value):
                length, at = _number(value, at)
                shape.append(length)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and isinstance(value, memoryview):
            name = bytes(value).decode()
    return Tensor(name, tuple(shape), SIZES.get(kind, 1))


def _value(data: memoryview) -> Tensor:
    """An input or an output: ValueInfoProto → TypeProto.Tensor → TensorShapeProto."""
    name, shape, kind = "", [], 0
    for number, value in _fields(data):
        if number == 1 and isinstance(value, memoryview):
            name = bytes(value).decode()
        if number == 2 and isinstance(value, memoryview):
            for inner, tensor in _fields(value):
                if inner != 1 or not isinstance(tensor, memoryview):
                    continue
                for part, said in _fields(tensor):
                    if part == 1 and isinstance(said, int):
                        kind = said
                    elif part == 2 and isinstance(said, memoryview):
                        for _, length in _fields(said):
                            known = [n for f, n in _fields(length) if f == 1] if isinstance(length, memoryview) else []
                            shape.append(known[0] if known and isinstance(known[0], int) else 0)
    return Tensor(name, tuple(shape), SIZES.get(kind, 1))
