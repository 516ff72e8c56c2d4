"""The minimal model (`minimal`) for LiteRT, written table by table of its file's schema: the converter is not installed here.

One layer of attention, with the signatures `decode` and `prefill_8`. The table of tokens is int8 with a scale for each row, so that an
idle runtime has mapped the code of such products beside that of float32 ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PREFILL = 8
NEWER = ("FULLY_CONNECTED", "EMBEDDING_LOOKUP")
"""Operations that take an int8 matrix beside float32 from version 3 on."""


class File:
    """A model while it is written; its signatures share constants."""

    def __init__(self, schema: Any) -> None:
        self.schema, self.model = schema, schema.ModelT()
        self.model.version, self.model.description, self.model.buffers = 3, "minimal", [schema.BufferT()]
        self.model.operatorCodes, self.model.subgraphs, self.model.signatureDefs = [], [], []
        self._codes: dict[str, int] = {}
        self._places: dict[bytes, int] = {}

    def code(self, name: str) -> int:
        """The number of an operation."""
        if name not in self._codes:
            made = self.schema.OperatorCodeT()
            made.builtinCode = getattr(self.schema.BuiltinOperator, name)
            made.deprecatedBuiltinCode, made.version = min(made.builtinCode, 127), 3 if name in NEWER else 1
            self._codes[name] = len(self.model.operatorCodes)
            self.model.operatorCodes.append(made)
        return self._codes[name]

    def constant(self, values: Any) -> int:
        """The number of the buffer with these values."""
        import numpy as np

        raw = values.tobytes()
        if raw not in self._places:
            made = self.schema.BufferT()
            made.data = np.frombuffer(raw, np.uint8)
            self._places[raw] = len(self.model.buffers)
            self.model.buffers.append(made)
        return self._places[raw]

    def add(self, name: str, graph: Graph, results: Mapping[str, int]) -> None:
        """Take a finished graph as the signature `name`."""
        graph.made.outputs = list(results.values())
        signature = self.schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = name, len(self.model.subgraphs)
        signature.inputs, signature.outputs = self._maps(graph.given), self._maps(results)
        self.model.subgraphs.append(graph.made)
        self.model.signatureDefs.append(signature)

    def _maps(self, named: Mapping[str, int]) -> list[Any]:
        maps = []
        for name, tensor in named.items():
            maps.append(self.schema.TensorMapT())
            maps[-1].name, maps[-1].tensorIndex = name, tensor
        return maps

    def save(self, place: Path) -> None:
        """Write it."""
        import flatbuffers

        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        place.write_bytes(bytes(builder.Output()))


class Graph:
    """A signature while it is written; tensors are numbers."""

    def __init__(self, file: File, name: str) -> None:
        self.file, self.schema, self.made = file, file.schema, file.schema.SubGraphT()
        self.made.name, self.made.tensors, self.made.operators, self.made.inputs = name, [], [], []
        self.given: dict[str, int] = {}

    def tensor(self, name: str, shape: Sequence[int], kind: str = "FLOAT32", buffer: int = 0) -> int:
        made = self.schema.TensorT()
        made.name, made.shape, made.buffer = name, list(shape), buffer
        made.type = getattr(self.schema.TensorType, kind)
        self.made.tensors.append(made)
        return len(self.made.tensors) - 1

    def take(self, name: str, shape: Sequence[int], kind: str = "FLOAT32") -> int:
        """An input."""
        self.given[name] = self.tensor(name, shape, kind)
        self.made.inputs.append(self.given[name])
        return self.given[name]

    def value(self, values: Any) -> int:
        """A constant."""
        return self.tensor("", values.shape, str(values.dtype).upper(), self.file.constant(values))

    def ints(self, *values: int) -> int:
        """A constant of whole numbers."""
        import numpy as np

        return self.value(np.array(values, np.int32))

    def op(
        self, name: str, inputs: Sequence[int], shape: Sequence[int], options: str = "", kind: str = "FLOAT32", **set_to: Any
    ) -> int:  # fmt: skip
        """An operation with one result. `options`: the schema's name of its settings, of which `set_to` are not the usual ones."""
        made = self.schema.OperatorT()
        made.opcodeIndex = self.file.code(name)
        made.inputs, made.outputs = list(inputs), [self.tensor(f"t{len(self.made.tensors)}", shape, kind)]
        if options:
            made.builtinOptionsType = getattr(self.schema.BuiltinOptions, options)
            made.builtinOptions = getattr(self.schema, f"{options}T")()
            for field, setting in set_to.items():
                setattr(made.builtinOptions, field, setting)
        self.made.operators.append(made)
        return int(made.outputs[0])

    def shaped(self, x: int, *shape: int, kind: str = "FLOAT32") -> int:
        return self.op("RESHAPE", [x, self.ints(*shape)], shape, "ReshapeOptions", kind, newShape=list(shape))

    def product(self, x: int, matrix: int, rows: int, outputs: int) -> int:
        return self.op("FULLY_CONNECTED", [x, matrix, -1], (rows, outputs), "FullyConnectedOptions")


def write(place: Path, hidden: int, heads: int, context: int, vocabulary: int) -> None:
    """Write `model.tflite`."""
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    rng = np.random.default_rng(0)
    matrices = [rng.normal(0, 0.1, (hidden, hidden)).astype(np.float32) for _ in range(4)]
    codes = rng.integers(-127, 128, (vocabulary, hidden)).astype(np.int8)
    file = File(schema)
    for tokens in (PREFILL, 1):
        name = "decode" if tokens == 1 else f"prefill_{tokens}"
        graph = Graph(file, name)
        file.add(name, graph, _layer(graph, tokens, heads, context, matrices, codes))
    file.save(place)


def _layer(
    g: Graph, tokens: int, heads: int, context: int, matrices: Sequence[NDArray[np.float32]], codes: NDArray[np.int8]
) -> dict[str, int]:
    """The operations of a signature; its results by name."""
    import numpy as np

    vocabulary, hidden = codes.shape
    size = hidden // heads
    ids, at = g.take("tokens", (1, tokens), "INT32"), g.take("input_pos", (tokens,), "INT32")
    mask = g.take("mask", (1, 1, tokens, context))
    keys, values = g.take("kv_cache_k_0", (1, heads, context, size)), g.take("kv_cache_v_0", (1, heads, size, context))
    table = g.value(codes)
    steps = g.schema.QuantizationParametersT()
    steps.scale, steps.zeroPoint = np.full(vocabulary, 0.003, np.float32), np.zeros(vocabulary, np.int64)
    g.made.tensors[table].quantization = steps
    x = g.op("EMBEDDING_LOOKUP", [g.shaped(ids, tokens, kind="INT32"), table], (tokens, hidden))
    q, k, v = (g.shaped(g.product(x, g.value(m), tokens, hidden), 1, tokens, heads, size) for m in matrices[:3])
    first = g.op("SLICE", [at, g.ints(0), g.ints(1)], (1,), "SliceOptions", "INT32")

    def turned(x: int, order: Sequence[int], *shape: int) -> int:
        return g.op("TRANSPOSE", [x, g.ints(*order)], shape, "TransposeOptions")

    def kept(past: int, new: int, shape: Sequence[int], *before: int) -> int:
        """The past with new rows from position `first` of the axis after `before`."""
        parts = [g.ints(*before), first, g.ints(0)] if len(before) == 2 else [g.ints(*before), first]
        start = g.op("CONCATENATION", parts, (4,), "ConcatenationOptions", "INT32", axis=0)
        return g.op("DYNAMIC_UPDATE_SLICE", [past, new, start], shape, "DynamicUpdateSliceOptions")

    keys = kept(keys, turned(k, (0, 2, 1, 3), 1, heads, tokens, size), (1, heads, context, size), 0, 0)
    values = kept(values, turned(v, (0, 2, 3, 1), 1, heads, size, tokens), (1, heads, size, context), 0, 0, 0)
    scored = (1, heads, tokens, context)
    asked = turned(q, (0, 2, 1, 3), 1, heads, tokens, size)
    scores = g.op(
        "ADD",
        [g.op("BATCH_MATMUL", [asked, keys], scored, "BatchMatMulOptions", adjY=True), mask],
        scored,
        "AddOptions",
    )
    shares = g.op("SOFTMAX", [scores], scored, "SoftmaxOptions", beta=1.0)
    mixed = g.op("BATCH_MATMUL", [shares, values], (1, heads, tokens, size), "BatchMatMulOptions", adjY=True)
    mixed = g.shaped(turned(mixed, (0, 2, 1, 3), 1, tokens, heads, size), tokens, hidden)
    kinds = {"inDataType": g.schema.TensorType.INT32, "outDataType": g.schema.TensorType.FLOAT32}
    wave = g.shaped(g.op("COS", [g.op("CAST", [at], (tokens,), "CastOptions", **kinds)], (tokens,)), tokens, 1)
    mixed = g.op("MUL", [g.product(mixed, g.value(matrices[3]), tokens, hidden), wave], (tokens, hidden), "MulOptions")
    results = {"kv_cache_k_0": keys, "kv_cache_v_0": values}
    if tokens == 1:
        last = g.op("ADD", [x, mixed], (1, hidden), "AddOptions")
        results["logits"] = g.shaped(g.product(last, table, 1, vocabulary), 1, 1, vocabulary)
    return results
