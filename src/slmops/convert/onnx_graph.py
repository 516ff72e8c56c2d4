"""Rewriting a decoder graph that the model builder made: rounded weights, and nothing in the file but the model.

`rewrite` takes the builder's float32 graph and
- replaces every product with a constant matrix by `MatMulNBits`, and the embedding look-up by `GatherBlockQuantized`
  over the very same table where the model ties its embedding to its output layer;
- keeps scales as float16 (widened when the session folds constants), and computes the rotary tables from their
  frequencies in the graph instead of storing them, where that gives the same numbers;
- drops names, documentation and everything else that differs from machine to machine.

Inputs, outputs and their names stay: the runtime goes by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slmops.convert.rounding import Rounded, round_matrix, ternary
from slmops.core.widths import TABLE, unit_of
from slmops.errors import ConversionError

ROTARY_TOLERANCE = 2e-6
TERNARY_BLOCK = 128
"""Weights that share a stored scale in ternary layers: the largest block that the runtime's fast products take."""


@dataclass
class Rewrite:
    """What a rewrite did: names of the products and look-ups that were rounded, and of those that stayed float32."""

    rounded: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    rotary_computed: bool = False


def rewrite(
    model: Any,
    *,
    bits: int | None,
    block_size: int,
    accuracy_level: int,
    search: bool = True,
    table_bits: int | None = None,
    widths: Mapping[str, int] | None = None,
    exact: bool = False,
) -> Rewrite:
    """Rewrite an `onnx.ModelProto` in place. `bits` None leaves the weights as they are.

    Args:
        table_bits: of the embedding's table and of the output matrix; default: `bits`.
        widths: bits by unit (`core.widths`), before `bits` and `table_bits`.
        exact: the layers are ternary, and are taken as they are, in blocks of TERNARY_BLOCK; tables are rounded by `search`.

    Raises:
        ConversionError: the graph has no product that can be rounded, though `bits` asks for it; or is not ternary.
    """
    graph = model.graph
    report = Rewrite()
    _constants_to_initialisers(graph)
    if bits is not None:
        chosen = {TABLE: table_bits or bits} | dict(widths or {})
        _round_weights(graph, bits, chosen, block_size, accuracy_level, search, exact, report)
        if not report.rounded:
            raise ConversionError("the graph has no weight that can be rounded", "use convert.precision: fp32")
    report.rotary_computed = _compute_rotary(graph)
    _drop_unused(graph)
    _strip(model)
    return report


def _constants_to_initialisers(graph: Any) -> None:
    for node in [n for n in graph.node if n.op_type == "Constant"]:
        tensor = node.attribute[0].t
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)


def _round_weights(
    graph: Any, bits: int, widths: Mapping[str, int], block_size: int, accuracy_level: int, search: bool, exact: bool, report: Rewrite
) -> None:  # fmt: skip
    import numpy as np
    from onnx import helper, numpy_helper

    tensors = {t.name: t for t in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    done: dict[str, tuple[str, str, Rounded]] = {}
    nodes: list[Any] = []
    tables = [_table(node.input[0], tensors, makers) for node in graph.node if node.op_type == "Gather"]
    vocabularies = {found[1].shape[0] for found in tables if found is not None}

    def bits_of(node: Any, matrix: Any) -> int:
        return widths.get(TABLE if matrix.shape[0] in vocabularies else unit_of(node.name) or "", bits)

    def rounded_of(name: str, matrix: Any, width: int) -> Rounded:
        """A matrix (out, in) rounded."""
        found = ternary(matrix, bits, TERNARY_BLOCK) if exact else None
        if found is None and exact and matrix.shape[0] not in vocabularies:
            raise ConversionError(
                f"the product with {name} is not ternary", "give a model trained with quantization_aware: ternary"
            )
        return found or round_matrix(matrix, width, block_size, search=search)

    def store(name: str, matrix: Any, width: int) -> tuple[str, str, Rounded]:
        """Round a matrix (out, in) once; returns the names of codes and scales, and what they hold."""
        if name not in done:
            rounded = rounded_of(name, matrix, width)
            codes, half, wide = f"{name}/q", f"{name}/h", f"{name}/s"
            graph.initializer.append(numpy_helper.from_array(rounded.packed(), codes))
            graph.initializer.append(numpy_helper.from_array(rounded.scales, half))
            nodes.append(helper.make_node("Cast", [half], [wide], to=1))
            done[name] = (codes, wide, rounded)
        return done[name]

    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors and len(tensors[node.input[1]].dims) == 2:
            matrix = numpy_helper.to_array(tensors[node.input[1]]).T
            codes, scales, made = store(node.input[1], matrix, bits_of(node, matrix))
            nodes.append(
                helper.make_node(
                    "MatMulNBits",
                    [node.input[0], codes, scales],
                    list(node.output),
                    domain="com.microsoft",
                    K=matrix.shape[1],
                    N=matrix.shape[0],
                    bits=made.bits,
                    block_size=made.codes.shape[2],
                    accuracy_level=accuracy_level,
                )
            )
            report.rounded.append(node.name or node.output[0])
        elif node.op_type == "Gather" and (table := _table(node.input[0], tensors, makers)) is not None:
            name, matrix = table
            codes, scales, made = store(name, matrix, bits_of(node, matrix))
            rows, columns = matrix.shape
            padded = made.codes.shape[1] * made.codes.shape[2]
            shape, flat = f"{name}/shape", f"{name}/flat"
            graph.initializer.append(
                numpy_helper.from_array(np.array([rows, padded * made.bits // 8], np.int64), shape)
            )
            nodes.append(helper.make_node("Reshape", [codes, shape], [flat]))
            out = node.output[0] if padded == columns else f"{name}/padded"
            nodes.append(
                helper.make_node(
                    "GatherBlockQuantized",
                    [flat, node.input[1], scales],
                    [out],
                    domain="com.microsoft",
                    bits=made.bits,
                    block_size=made.codes.shape[2],
                    gather_axis=0,
                    quantize_axis=1,
                )
            )
            if padded != columns:
                bounds = {f"{name}/from": [0], f"{name}/to": [columns], f"{name}/axis": [2]}
                for key, value in bounds.items():
                    graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), key))
                nodes.append(helper.make_node("Slice", [out, *bounds], [node.output[0]]))
            report.rounded.append(node.name or node.output[0])
        else:
            if node.op_type in ("MatMul", "Gemm") and any(i in tensors for i in node.input):
                report.kept.append(node.name or node.output[0])
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _table(name: str, tensors: dict[str, Any], makers: dict[str, Any]) -> tuple[str, Any] | None:
    """The embedding table (vocabulary, hidden) behind a look-up and its tensor's name; None for other look-ups."""
    from onnx import numpy_helper

    if name in tensors:
        tensor = tensors[name]
        return (name, numpy_helper.to_array(tensor)) if len(tensor.dims) == 2 and tensor.data_type == 1 else None
    maker = makers.get(name)
    if maker is not None and maker.op_type == "Transpose" and maker.input[0] in tensors:
        return maker.input[0], numpy_helper.to_array(tensors[maker.input[0]]).T
    return None


def _compute_rotary(graph: Any) -> bool:
    """Replace stored tables of cosines and sines (positions, half) by their frequencies, where that gives the same.

    Returns:
        Whether no table is left.
    """
    names = [t.name.removeprefix("cos_cache") for t in graph.initializer if t.name.startswith("cos_cache")]
    done = [_compute_tables(graph, name) for name in names]
    return bool(done) and all(done)


def _compute_tables(graph: Any, name: str) -> bool:
    """The same for `cos_cache` and `sin_cache` with a name behind: a model may have several."""
    import numpy as np
    from onnx import helper, numpy_helper

    tensors = {t.name: t for t in graph.initializer}
    if f"sin_cache{name}" not in tensors:
        return False
    cos, sin = (numpy_helper.to_array(tensors[f"{part}_cache{name}"]) for part in ("cos", "sin"))
    if cos.dtype != np.float32 or cos.ndim != 2 or cos.shape[0] < 2:
        return False
    positions = np.arange(cos.shape[0], dtype=np.float32)[:, None]
    frequencies = np.arctan2(sin[1].astype(np.float64), cos[1].astype(np.float64)).astype(np.float32)
    frequencies = _refine(frequencies, cos, sin)
    angles = positions * frequencies[None, :]
    if max(np.abs(np.cos(angles) - cos).max(), np.abs(np.sin(angles) - sin).max()) > ROTARY_TOLERANCE:
        return False
    here = f"rotary{name}"
    constants = {
        "f": frequencies[None, :], "0": np.array(0, np.int64), "1": np.array(1, np.int64),
        "n": np.array(cos.shape[0], np.int64), "column": np.array([-1, 1], np.int64),
    }  # fmt: skip
    graph.initializer.extend(numpy_helper.from_array(value, f"{here}/{key}") for key, value in constants.items())
    made = [
        helper.make_node("Range", [f"{here}/0", f"{here}/n", f"{here}/1"], [f"{here}/i"]),
        helper.make_node("Cast", [f"{here}/i"], [f"{here}/p"], to=1),
        helper.make_node("Reshape", [f"{here}/p", f"{here}/column"], [f"{here}/c"]),
        helper.make_node("Mul", [f"{here}/c", f"{here}/f"], [f"{here}/a"]),
        helper.make_node("Cos", [f"{here}/a"], [f"{here}/cos"]),
        helper.make_node("Sin", [f"{here}/a"], [f"{here}/sin"]),
    ]
    for node in graph.node:
        for i, read in enumerate(node.input):
            if read in (f"cos_cache{name}", f"sin_cache{name}"):
                node.input[i] = f"{here}/{read[:3]}"
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend(made + rest)
    return True


def _refine(frequencies: Any, cos: Any, sin: Any) -> Any:
    """Frequencies exact enough for the last position: the neighbour (in float32 steps) that fits the tables best.

    An angle read off position 1 may be wrong by a unit in the last place, which the last position multiplies.
    """
    import numpy as np

    last = np.float32(cos.shape[0] - 1)
    best, error = frequencies, np.full(frequencies.shape, np.inf)
    for step in range(-6, 7):
        trial = (frequencies.view(np.int32) + step).view(np.float32)
        angle = last * trial
        off = np.abs(np.cos(angle) - cos[-1]) + np.abs(np.sin(angle) - sin[-1])
        best = np.where(off < error, trial, best)
        error = np.minimum(error, off)
    return best.astype(np.float32)


def _drop_unused(graph: Any) -> None:
    """Remove nodes and tensors whose results nothing reads."""
    wanted = {o.name for o in graph.output}
    while True:
        read = wanted | {name for node in graph.node for name in node.input}
        dead = [n for n in graph.node if not any(o in read for o in n.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    unread = [t for t in graph.initializer if t.name not in read]
    for tensor in unread:
        graph.initializer.remove(tensor)


def _strip(model: Any) -> None:
    """Short names in order of appearance; no documentation, no metadata, no shapes that can be inferred."""
    graph = model.graph
    fixed = {v.name for v in [*graph.input, *graph.output]}
    short: dict[str, str] = {"": ""}

    def rename(name: str) -> str:
        if name in fixed:
            return name
        return short.setdefault(name, f"_{len(short):x}")

    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [rename(n) for n in names]
        node.ClearField("name")
        node.ClearField("doc_string")
        del node.metadata_props[:]
        attributes = sorted(node.attribute, key=lambda a: a.name)
        del node.attribute[:]
        node.attribute.extend(attributes)
    tensors = sorted(graph.initializer, key=lambda t: int(short[t.name][1:], 16))
    for tensor in tensors:
        tensor.name = short[tensor.name]
        tensor.ClearField("doc_string")
        del tensor.metadata_props[:]
    tensors = [_copy(t) for t in tensors]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    del graph.value_info[:]
    del graph.metadata_props[:]
    graph.ClearField("doc_string")
    graph.name = "decoder"
    del model.metadata_props[:]
    model.ClearField("doc_string")
    model.ClearField("domain")
    model.ClearField("model_version")
    model.producer_name, model.producer_version = "slmops", ""


def _copy(message: Any) -> Any:
    other = type(message)()
    other.CopyFrom(message)
    return other
