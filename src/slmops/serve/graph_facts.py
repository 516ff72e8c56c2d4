"""What a graph of ONNX says of its memory, read from the file without loading it: its inputs, its outputs and its tensors.

Only the few fields that are needed are read, by the numbers that onnx.proto3 gives them; the bytes of tensors are stepped over.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slmops.errors import ModelError
from slmops.serve.protobuf import fields, varint

SIZES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""Bytes of a number by TensorProto.DataType; types that are not here count one byte."""


@dataclass(frozen=True)
class Tensor:
    """A named tensor. `shape`: 0 where a length is not fixed; `kind`: TensorProto.DataType."""

    name: str
    shape: tuple[int, ...]
    kind: int

    @property
    def item(self) -> int:
        """Bytes of one number."""
        return SIZES.get(self.kind, 1)

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


def parts(file: Path) -> Iterator[tuple[int, memoryview]]:
    """The messages in the graph of a model's file, each with its number in `GraphProto`; the file stays where it is.

    Raises:
        OSError, ValueError, IndexError: the file cannot be read, or is no graph.
    """
    with file.open("rb") as opened:
        whole = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    for number, graph in fields(whole):
        if number == 7 and isinstance(graph, memoryview):  # ModelProto.graph
            for inner, part in fields(graph):
                if isinstance(part, memoryview):
                    yield inner, part


def read(file: Path) -> Graph:
    """The facts of a graph.

    Raises:
        ModelError: the file is no graph.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    weights: list[Tensor] = []
    try:
        for number, said in parts(file):
            if number == 5:  # GraphProto.initializer
                weights.append(_tensor(said))
            elif number in (11, 12):  # GraphProto.input, output
                (inputs if number == 11 else outputs).append(_value(said))
    except (OSError, ValueError, IndexError) as error:
        raise ModelError(f"{file} cannot be read: {error}", "convert the model again") from error
    if not outputs:
        raise ModelError(f"{file} is no graph of ONNX", "convert the model again")
    return Graph(tuple(inputs), tuple(outputs), tuple(weights))


def _tensor(data: memoryview) -> Tensor:
    name, shape, kind = "", [], 0
    for number, value in fields(data):
        if number == 1 and isinstance(value, int):
            shape.append(value)
        elif number == 1 and isinstance(value, memoryview):  # packed
            at = 0
            while at < len(value):
                length, at = varint(value, at)
                shape.append(length)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and isinstance(value, memoryview):
            name = bytes(value).decode()
    return Tensor(name, tuple(shape), kind)


def _value(data: memoryview) -> Tensor:
    """An input or an output: ValueInfoProto → TypeProto.Tensor → TensorShapeProto."""
    name, shape, kind = "", [], 0
    for number, value in fields(data):
        if number == 1 and isinstance(value, memoryview):
            name = bytes(value).decode()
        if number == 2 and isinstance(value, memoryview):
            for inner, tensor in fields(value):
                if inner != 1 or not isinstance(tensor, memoryview):
                    continue
                for part, said in fields(tensor):
                    if part == 1 and isinstance(said, int):
                        kind = said
                    elif part == 2 and isinstance(said, memoryview):
                        for _, length in fields(said):
                            known = [n for f, n in fields(length) if f == 1] if isinstance(length, memoryview) else []
                            shape.append(known[0] if known and isinstance(known[0], int) else 0)
    return Tensor(name, tuple(shape), kind)
