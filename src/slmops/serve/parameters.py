"""How many parameters a served model has and how many bits they take, from the headers of its files, without loading it.

Counted are the numbers that training would set: matrices, tables, biases and norms, each once, where it lies; a table that a file
holds twice counts twice, as in Ollama. Scales and zeros of rounded weights, rotations and adapters are none. The bits are those of most of
the numbers that are multiplied: a table that is only looked up in does not count for them. Where a graph or a folder rounds in a way
that is not known here, nothing is told rather than something wrong.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from slmops.engines import find_gguf, gguf_parts, read_json
from slmops.errors import SlmopsError
from slmops.serve import gguf_facts, graph_facts
from slmops.serve.engines import Kind
from slmops.serve.protobuf import fields
from slmops.train import shape

SAME = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators whose first input is the same weight, arranged otherwise."""
NORMS = ("LayerNormalization", "SimplifiedLayerNormalization")
SKIP_NORMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
PRODUCTS = frozenset(
    [(name, 0) for name in ("MatMul", "Gemm", "DequantizeLinear")]
    + [(name, 1) for name in ("MatMul", "Gemm", "MatMulInteger", "DynamicQuantizeMatMul")]
)
"""Operator and place of inputs that are matrices to multiply by, number for number."""
WEIGHTS = frozenset(
    [(name, 0) for name in ("Gather", "Conv", "Add")]
    + [(name, 1) for name in ("Conv", "Add", *NORMS)]
    + [(name, 2) for name in ("Gemm", "Conv", "LayerNormalization", *SKIP_NORMS)]
    + [("SkipLayerNormalization", 3), ("MatMulNBits", 5)]
)
"""Operator and place of other inputs that are parameters, number for number."""
LARGE = 4096
"""Numbers in a tensor that is too large to be passed over where its use is not known."""
OTHER = ("MatMulNBits", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding", "DequantizeLinear", "Mul", "MatMulInteger",
         "DynamicQuantizeMatMul")  # fmt: skip
"""Operators whose further inputs are scales, zeros and rotations."""
TYPES = {1: "F32", 2: "INT8", 3: "INT8", 10: "F16", 16: "BF16"}
"""Names of TensorProto.DataType; those of floating point as GGUF has them."""
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L",
    14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
    36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0",
}  # fmt: skip
"""`general.file_type` of GGUF, as llama.cpp names it."""


@dataclass(frozen=True)
class Size:
    """`count`: how many parameters; None where that is not known. `bits`: F32, F16, Q4_K_M, INT4, …; "" where they are not known."""

    count: int | None = None
    bits: str = ""


def size(folder: Path, engine: Kind) -> Size:
    """Of a folder or a GGUF file."""
    try:
        if engine == "onnx":
            decoder = read_json(folder / "genai_config.json")["model"]["decoder"]
            return _in_graph(folder / decoder["filename"])
        if engine == "llama_cpp":
            file = folder if folder.is_file() else find_gguf(folder)
            if file is None:
                return Size()
            parts = [gguf_facts.counted(part) for part in gguf_parts(file)]
            bits = FILE_TYPES.get(int(parts[0][1].get("general.file_type", -1)), "")
            return Size(sum(numbers for numbers, _ in parts) or None, bits)
        if "quantization_config" in read_json(folder / "config.json"):
            return Size()
        return _of(shape.weights_by_type(folder))
    except (SlmopsError, OSError, ValueError, KeyError, TypeError, IndexError, ArithmeticError):
        return Size()


@lru_cache(maxsize=1024)
def known(folder: Path, engine: Kind, digest: str) -> Size:
    """The same, looked up once for files that have this digest."""
    return size(folder, engine)


def words(parameters: int | None) -> str:
    """A number as Ollama writes it: 494.03M, 1.5B, 8B; "" where it is not known."""
    if parameters is None:
        return ""
    for unit, name, digits in ((10**9, "B", 1), (10**6, "M", 2)):
        if parameters >= unit:
            return f"{parameters // unit if parameters % unit == 0 else f'{parameters / unit:.{digits}f}'}{name}"
    return f"{parameters / 1000:.0f}K" if parameters >= 1000 else str(parameters)


def _of(numbers: Counter[str], others: int = 0) -> Size:
    """Numbers that are multiplied, by their bits, and others."""
    return Size(sum(numbers.values()) + others or None, max(numbers, key=numbers.__getitem__, default=""))


def _in_graph(file: Path) -> Size:
    uses: dict[str, list[tuple[str, int, dict[str, int]]]] = defaultdict(list)
    stands_for: dict[str, str] = {}
    for kind, inputs, outputs, numbers in _nodes(file):
        names = [stands_for.get(name, name) for name in inputs]
        if kind in SAME:
            stands_for.update((name, names[0]) for name in outputs)
            names = names[:1] if kind == "Transpose" else []
        for place, name in enumerate(names):
            uses[name].append((kind, place, numbers))
    multiplied: Counter[str] = Counter()
    others = 0
    for tensor in graph_facts.read(file).weights:
        length, used = math.prod(tensor.shape), uses[tensor.name]
        by_bits = next((n for kind, place, n in used if (kind, place) == ("MatMulNBits", 1)), None)
        table = next((n for kind, place, n in used if (kind, place) == ("GatherBlockQuantized", 0)), None)
        places = {(kind, place) for kind, place, _ in used}
        if by_bits is not None:
            multiplied[f"INT{by_bits.get('bits', 4)}"] += by_bits["K"] * by_bits["N"]
        elif table is not None:
            others += length * 8 // table.get("bits", 4) if tensor.item == 1 else length
        elif tensor.shape and places & PRODUCTS:
            multiplied[TYPES.get(tensor.kind, "")] += length
        elif tensor.shape and places & WEIGHTS:
            others += length
        elif length >= LARGE and not any(kind in OTHER for kind, _, _ in used):
            return Size()
    return _of(multiplied, others)


def _nodes(file: Path) -> Iterator[tuple[str, list[str], list[str], dict[str, int]]]:
    """The nodes of a graph in their order: operator, names of inputs and outputs, attributes that are whole numbers."""
    for place, node in graph_facts.parts(file):
        if place == 1:  # GraphProto.node
            kind, inputs, outputs, numbers = "", list[str](), list[str](), dict[str, int]()
            for part, value in fields(node):
                if not isinstance(value, memoryview):
                    continue
                if part in (1, 2):
                    (inputs if part == 1 else outputs).append(bytes(value).decode())
                elif part == 4:
                    kind = bytes(value).decode()
                elif part == 5:  # AttributeProto: name, i
                    said = dict(fields(value))
                    name, entry = said.get(1), said.get(3)
                    if isinstance(name, memoryview) and isinstance(entry, int):
                        numbers[bytes(name).decode()] = entry
            yield kind, inputs, outputs, numbers
