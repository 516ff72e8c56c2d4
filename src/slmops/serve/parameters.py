"""How many parameters a served model has, from the headers of its files, without loading it.

Counted are the numbers that training would set: matrices, tables, biases and norms, each once, where it lies; a table that a file
holds twice counts twice, as in Ollama. Scales and zeros of rounded weights, rotations and adapters are none. Where a graph or a folder
rounds in a way that is not known here, nothing is told rather than something wrong.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
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
WEIGHTS = frozenset(
    [(name, 0) for name in ("Gather", "MatMul", "Gemm", "DequantizeLinear", "Conv")]
    + [(name, 1) for name in ("MatMul", "Gemm", "MatMulInteger", "DynamicQuantizeMatMul", "Conv", "Add", *NORMS)]
    + [("Gemm", 2), ("Conv", 2), ("Add", 0), ("LayerNormalization", 2), ("MatMulNBits", 5), *[(name, 2) for name in SKIP_NORMS]]
    + [(name, 3) for name in ("SkipLayerNormalization",)]
)  # fmt: skip
"""Operator and place of inputs that are parameters, number for number."""
LARGE = 4096
"""Numbers in a tensor that is too large to be passed over where its use is not known."""
OTHER = ("MatMulNBits", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding", "DequantizeLinear", "Mul", "MatMulInteger",
         "DynamicQuantizeMatMul")  # fmt: skip
"""Operators whose further inputs are scales, zeros and rotations."""


def count(folder: Path, engine: Kind) -> int | None:
    """Parameters of a folder or a GGUF file; None where they are not known."""
    try:
        if engine == "onnx":
            decoder = read_json(folder / "genai_config.json")["model"]["decoder"]
            return _in_graph(folder / decoder["filename"])
        if engine == "llama_cpp":
            file = folder if folder.is_file() else find_gguf(folder)
            return None if file is None else sum(map(gguf_facts.numbers, gguf_parts(file))) or None
        config = read_json(folder / "config.json")
        return None if "quantization_config" in config else shape.weights(folder) or None
    except (SlmopsError, OSError, ValueError, KeyError, TypeError, IndexError, ArithmeticError):
        return None


@lru_cache(maxsize=1024)
def known(folder: Path, engine: Kind, digest: str) -> int | None:
    """The same, looked up once for files that have this digest."""
    return count(folder, engine)


def words(parameters: int | None) -> str:
    """A number as Ollama writes it: 494.03M, 1.5B, 8B; "" where it is not known."""
    if parameters is None:
        return ""
    for unit, name, digits in ((10**9, "B", 1), (10**6, "M", 2)):
        if parameters >= unit:
            return f"{parameters // unit if parameters % unit == 0 else f'{parameters / unit:.{digits}f}'}{name}"
    return f"{parameters / 1000:.0f}K" if parameters >= 1000 else str(parameters)


def _in_graph(file: Path) -> int | None:
    uses: dict[str, list[tuple[str, int, dict[str, int]]]] = defaultdict(list)
    stands_for: dict[str, str] = {}
    for kind, inputs, outputs, numbers in _nodes(file):
        names = [stands_for.get(name, name) for name in inputs]
        if kind in SAME:
            stands_for.update((name, names[0]) for name in outputs)
            names = names[:1] if kind == "Transpose" else []
        for place, name in enumerate(names):
            uses[name].append((kind, place, numbers))
    found = 0
    for tensor in graph_facts.read(file).weights:
        size, used = math.prod(tensor.shape), uses[tensor.name]
        by_bits = next((n for kind, place, n in used if (kind, place) == ("MatMulNBits", 1)), None)
        table = next((n for kind, place, n in used if (kind, place) == ("GatherBlockQuantized", 0)), None)
        if by_bits is not None:
            found += by_bits["K"] * by_bits["N"]
        elif table is not None:
            found += size * 8 // table.get("bits", 4) if tensor.item == 1 else size
        elif tensor.shape and any((kind, place) in WEIGHTS for kind, place, _ in used):
            found += size
        elif size >= LARGE and not any(kind in OTHER for kind, _, _ in used):
            return None
    return found or None


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
