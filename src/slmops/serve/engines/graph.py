"""The last hidden states of an ONNX graph as one more output, without the package `onnx`: a decoder's graph as bytes, and back.

Protocol buffers merge when they stand one behind the other: a field that repeats goes on. So an output is added by a few bytes at the
end. What the graph calls its hidden states is found from its logits backwards, up to the last normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator

from slmops.serve.protobuf import fields

NORMS = {
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
}  # fmt: skip
GRAPH, NODE, OUTPUT = 7, 1, 12
"""Numbers of fields: of a model its graph, of a graph its nodes and outputs."""
INPUT, RESULT, KIND = 1, 2, 4
"""Of a node: names of its inputs and outputs, and its operation."""
FLOAT = 1


def with_hidden_states(model: bytes) -> tuple[bytes, str] | None:
    """The graph with one more output, and its name; None where no normalisation leads to the logits."""
    makers: dict[str, tuple[str, list[str], str]] = {}
    for number, graph in _parts(memoryview(model)):
        if number != GRAPH:
            continue
        for place, node in _parts(graph):
            if place != NODE:
                continue
            names: dict[int, list[str]] = {INPUT: [], RESULT: [], KIND: []}
            for part, value in _parts(node):
                if part in names:
                    names[part].append(bytes(value).decode("utf-8"))
            kind, first = "".join(names[KIND]), "".join(names[RESULT][:1])
            for result in names[RESULT]:
                if result:
                    makers[result] = (kind, names[INPUT], first)
    name, seen = "logits", set[str]()
    while name in makers and name not in seen:
        seen.add(name)
        kind, given, first = makers[name]
        if kind in NORMS:
            about = _field(1, first.encode()) + _field(2, _field(1, bytes([1 << 3, FLOAT])))
            return model + _field(GRAPH, _field(OUTPUT, about)), first
        name = given[0] if given else ""
    return None


def _parts(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each field of a message that has a length."""
    for number, value in fields(message):
        if isinstance(value, memoryview):
            yield number, value


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
