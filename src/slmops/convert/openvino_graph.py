"""The graph of a decoder in OpenVINO's operations: weights in any of four precisions, keys and values as state of the model.

Inputs and outputs are those that OpenVINO GenAI and Optimum expect of a language model: `input_ids`, `attention_mask` (over past and
new tokens), `position_ids` (int64, (rows, tokens)), `beam_idx` (int32, (rows,)), and `logits` (rows, tokens, vocabulary). Nothing is
traced: each operation is written as the architecture defines it, so equal weights give equal files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.convert.gguf import sizes, tied, turning
from slmops.convert.rounding import round_matrix
from slmops.core import runtimes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

LOWEST = -3.4028234663852886e38
"""Added to scores of keys that a token does not see."""


@dataclass
class Weights:
    """Reads matrices by name and writes them into the graph.

    Attributes:
        read: the values of a tensor, float32.
        precision, table: of the layers' matrices, and of the embedding and the output matrix.
        block_size: weights that share a scale in int4.
    """

    read: Callable[[str], Array]
    precision: str
    table: str
    block_size: int
    search: bool
    rounded: int = 0
    in_int8: list[str] = field(default_factory=list)
    _kept: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def matrix(self, name: str) -> Any:
        """A matrix (outputs, inputs) as float32 in the graph, from the form in which it is stored."""
        import openvino as ov
        from openvino import opset13 as ops

        precision = self.table if name in ("model.embed_tokens", "lm_head") else self.precision
        if precision not in ("int8", "int4"):
            return self._once(name, lambda: (ov.op.Constant(self.read(f"{name}.weight")), None))[0]
        codes, scales = self._once(name, lambda: self._rounded(name, precision))
        values = ops.multiply(ops.convert(codes, "f16"), scales)
        if len(codes.get_output_shape(0)) == 3:
            rows, groups, block = codes.get_output_shape(0)
            values = ops.reshape(values, ov.op.Constant(ov.Type.i64, ov.Shape([2]), [rows, groups * block]), False)
        return ops.convert(values, "f32")

    def _once(self, name: str, make: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def _rounded(self, name: str, precision: str) -> tuple[Any, Any]:
        """Codes and float16 scales. In int8 a row shares its scale; in int4 a block, where rows are a multiple of it."""
        import numpy as np
        import openvino as ov

        values = self.read(f"{name}.weight")
        self.rounded += 1
        if precision == "int4" and values.shape[1] % self.block_size == 0:
            found = round_matrix(values, 4, self.block_size, search=self.search)
            signed = found.packed() ^ np.uint8(0x88)  # from 0 to 15 to two's complement, -8 to 7
            tensor = ov.Tensor(signed, ov.Shape(list(found.codes.shape)), ov.Type.i4)
            return ov.op.Constant(tensor, shared_memory=False), ov.op.Constant(found.scales[..., None])
        if precision == "int4":
            self.in_int8.append(name)
        found = round_matrix(values, 8, values.shape[1], search=self.search)
        signed = (found.codes[:, 0] ^ np.uint8(0x80)).view(np.int8)
        return ov.op.Constant(signed), ov.op.Constant(found.scales)


def halved(model: Any, work: Path) -> Any:
    """The model with its matrices in float16, as the runtime marks weights that it may keep so. The runtime's own function does it
    to all constants, rotary speeds and the like too, which lose positions by it: those are put back.

    Args:
        work: a folder for a file in between, which must stay as long as the result.
    """
    import openvino as ov

    ov.save_model(model, work / "half.xml", compress_to_fp16=True)
    found = ov.Core().read_model(work / "half.xml")
    whole = {node.get_friendly_name(): node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"}
    for node in found.get_ordered_ops():
        if "decompression_0" in node.get_rt_info() and len(node.get_output_shape(0)) != 2:
            kept = ov.op.Constant(whole[node.get_friendly_name()].get_data())
            for consumer in node.output(0).get_target_inputs():
                consumer.replace_source_output(kept.output(0))
    return _named(found)


def _named(model: Any) -> Any:
    """With names by the place of nodes; by themselves they count all nodes of the process."""
    for place, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() != "Parameter":
            node.set_friendly_name(f"{node.get_type_name()}_{place}")
    return model


def build(config: Mapping[str, Any], weights: Weights) -> Any:
    """The model, an `openvino.Model`. `config` is one that `runtimes.openvino` takes."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    kind, hidden = config["model_type"], config["hidden_size"]
    heads, size, groups = sizes(config)
    gemma = kind == "gemma3_text"

    def number(value: Any, kind: Any = np.float32) -> Any:
        return ov.op.Constant(np.array(value, kind))

    def ints(*values: int) -> Any:
        return number(values, np.int64)

    ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    mask = ops.parameter([-1, -1], np.int64, name="attention_mask")
    positions = ops.parameter([-1, -1], np.int64, name="position_ids")
    beams = ops.parameter([-1], np.int32, name="beam_idx")
    shape = ops.shape_of(ids, "i64")
    rows, new = (ops.gather(shape, ints(axis), number(0, np.int64)) for axis in (0, 1))
    whole = ops.gather(ops.shape_of(mask, "i64"), ints(1), number(0, np.int64))

    def scalar(value: Any) -> Any:
        return ops.squeeze(value, ints(0))

    at = ops.range(ops.subtract(scalar(whole), scalar(new)), scalar(whole), number(1, np.int64), "i64")
    keys = ops.range(number(0, np.int64), scalar(whole), number(1, np.int64), "i64")
    at, keys = ops.unsqueeze(at, ints(1)), ops.unsqueeze(keys, ints(0))
    padding = ops.unsqueeze(ops.not_equal(mask, number(0, np.int64)), ints(1, 2))

    def bias(window: int | None) -> Any:
        """What is added to scores, (rows, 1, new, whole)."""
        seen = ops.less_equal(keys, at)
        if window:
            seen = ops.logical_and(seen, ops.less(ops.subtract(at, keys), number(window, np.int64)))
        return ops.select(ops.logical_and(seen, padding), number(0.0), number(LOWEST))

    def turns(layers: str) -> tuple[Any, Any, int]:
        """Rotary cosines and sines, (rows, 1, new, rotated), and how much of a head they turn."""
        speeds, stretch = turning(config, layers)
        angles = ops.multiply(
            ops.unsqueeze(ops.convert(positions, "f32"), ints(1, 3)), number(speeds[None, None, None])
        )
        angles = ops.concat([angles, angles], -1)
        both = [ops.cos(angles), ops.sin(angles)]
        if stretch != 1.0:
            both = [ops.multiply(part, number(stretch)) for part in both]
        return both[0], both[1], 2 * len(speeds)

    def turn(x: Any, how: tuple[Any, Any, int]) -> Any:
        cos, sin, rotated = how
        rest = None
        if rotated < size:
            x, rest = ops.variadic_split(x, number(3, np.int64), ints(rotated, size - rotated)).outputs()
        first, second = ops.variadic_split(x, number(3, np.int64), ints(rotated // 2, rotated // 2)).outputs()
        turned = ops.add(
            ops.multiply(x, cos), ops.multiply(ops.concat([ops.multiply(second, number(-1.0)), first], -1), sin)
        )
        return turned if rest is None else ops.concat([turned, rest], -1)

    def norm(x: Any, name: str) -> Any:
        weight = weights.read(f"{name}.weight") + (1.0 if gemma else 0.0)
        mean = ops.reduce_mean(ops.power(x, number(2.0)), ints(-1), True)
        root = ops.divide(number(1.0), ops.sqrt(ops.add(mean, number(config["rms_norm_eps"]))))
        return ops.multiply(ops.multiply(x, root), number(weight[None, None]))

    def linear(x: Any, name: str) -> Any:
        made = ops.matmul(x, weights.matrix(name), False, True)
        try:
            return ops.add(made, number(weights.read(f"{name}.bias")[None, None]))
        except KeyError:
            return made

    def split(x: Any, count: int) -> Any:
        return ops.reshape(x, ints(0, 0, count, size), True)

    def heads_first(x: Any) -> Any:
        return ops.transpose(x, ints(0, 2, 1, 3))

    def repeated(x: Any) -> Any:
        """Keys or values (rows, groups, whole, size) once for each head."""
        if heads == groups:
            return x
        wide = ops.broadcast(
            ops.unsqueeze(x, ints(2)),
            ops.concat([rows, ints(groups, heads // groups), whole, ints(size)], 0),
            broadcast_spec="BIDIRECTIONAL",
        )
        return ops.reshape(wide, ints(0, heads, -1, size), True)

    sinks = []

    def remembered(x: Any, name: str) -> Any:
        """Past and new keys or values; the past is a state of the model."""
        empty = ops.broadcast(number(0.0), ops.concat([rows, ints(groups, 0, size)], 0))
        past = ops.read_value(empty, name, ov.Type.f32, ov.PartialShape([-1, groups, -1, size]))
        both = ops.concat([ops.gather(past, beams, number(0, np.int64)), x], 2)
        sinks.append(ops.assign(both, name))
        return both

    def attention(x: Any, name: str, number_: int, how: tuple[Any, Any, int], bias: Any) -> Any:
        if kind == "phi3":
            packed = linear(x, f"{name}.qkv_proj")
            parts = ops.variadic_split(
                packed, number(-1, np.int64), ints(heads * size, groups * size, groups * size)
            ).outputs()
            q, k, v = (split(p, n) for p, n in zip(parts, (heads, groups, groups), strict=True))
        else:
            q, k, v = (
                split(linear(x, f"{name}.{p}_proj"), n) for p, n in zip("qkv", (heads, groups, groups), strict=True)
            )
        if kind in ("qwen3", "gemma3_text"):
            q, k = norm(q, f"{name}.q_norm"), norm(k, f"{name}.k_norm")
        q, k, v = heads_first(q), heads_first(k), heads_first(v)
        q, k = turn(q, how), turn(k, how)
        stem = f"past_key_values.{number_}"
        k, v = (remembered(x, f"{stem}.{part}present.{number_}.{part}") for x, part in ((k, "key"), (v, "value")))
        scale = (config.get("query_pre_attn_scalar") or 256) ** -0.5 if gemma else size**-0.5
        mixed = ops.scaled_dot_product_attention(q, repeated(k), repeated(v), bias, number(scale), causal=False)
        return linear(ops.reshape(heads_first(mixed), ints(0, 0, heads * size), True), f"{name}.o_proj")

    def feed_forward(x: Any, name: str) -> Any:
        if kind == "phi3":
            gate, up = ops.split(linear(x, f"{name}.gate_up_proj"), number(-1, np.int64), 2).outputs()
        else:
            gate, up = linear(x, f"{name}.gate_proj"), linear(x, f"{name}.up_proj")
        acted = ops.gelu(gate, "tanh") if gemma else ops.swish(gate)
        return linear(ops.multiply(acted, up), f"{name}.down_proj")

    x = ops.gather(weights.matrix("model.embed_tokens"), ids, number(0, np.int64))
    if gemma:
        x = ops.multiply(x, number(math.sqrt(hidden)))
    windows = runtimes.sliding(config) if gemma else [False] * config["num_hidden_layers"]
    window = config.get("sliding_window") or 4096
    full = (turns("full_attention"), bias(None))
    local = (turns("sliding_attention"), bias(window)) if any(windows) else full
    for layer, slides in enumerate(windows):
        name = f"model.layers.{layer}"
        made = attention(norm(x, f"{name}.input_layernorm"), f"{name}.self_attn", layer, *(local if slides else full))
        if gemma:
            x = ops.add(x, norm(made, f"{name}.post_attention_layernorm"))
            made = feed_forward(norm(x, f"{name}.pre_feedforward_layernorm"), f"{name}.mlp")
            x = ops.add(x, norm(made, f"{name}.post_feedforward_layernorm"))
        else:
            x = ops.add(x, made)
            x = ops.add(x, feed_forward(norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp"))
    head = "model.embed_tokens" if tied(config) else "lm_head"
    logits = ops.matmul(norm(x, "model.norm"), weights.matrix(head), False, True)
    cap = config.get("final_logit_softcapping") if gemma else None
    if cap:
        logits = ops.multiply(ops.tanh(ops.divide(logits, number(cap))), number(cap))
    result = ops.result(logits, "logits")
    model = ov.Model([result], sinks, [ids, mask, positions, beams], "decoder")
    for port in model.inputs:
        port.get_tensor().set_names({port.get_node().get_friendly_name()})
    model.outputs[0].get_tensor().set_names({"logits"})
    return _named(model)
