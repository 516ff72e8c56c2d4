"""Method `convert.onnx_adapters`: one base and N low-rank adapters become one ONNX Runtime GenAI folder.

The graph is that of the base alone, converted as by `convert.onnx_genai`. Beside the product of an adapted layer stands
x·A·B, whose A (inputs, rank) and B (rank, outputs) are optional inputs: by default they have rank 0 and add nothing. Each
adapter is a file `adapters/NAME.onnx_adapter` with its own rank, which `og.Adapters` loads and a generator switches to.
`adapters.json` names them, with digests. The model builder's own `adapter_path` cannot do that: it writes one adapter's
weights into the graph.

Adapters stay float32 beside a rounded base. Every adapter, and the base without any, is compared with PyTorch on
validation prompts; the numbers are in `fidelity.json`, and an fp32 conversion that does not agree is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.convert.onnx_genai import Params as ConvertParams
from slmops.core.digest import digest_file
from slmops.core.method import Context, Declaration, Facts, named_inputs
from slmops.engines.adapters import ADAPTERS
from slmops.errors import ConversionError
from slmops.store import lora

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[np.float32]]

DECLARATION = Declaration(
    name="convert.onnx_adapters",
    version="2",
    makes="model",
    takes={"base": "model", "adapter*": "model", "data*": "dataset"},
    extra="convert",
    packages=("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers", "safetensors"),
)

LAYER = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)")
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that a model of Hugging Face holds as one and the graph as several."""
QUIET = 3
"""Severity from which the runtime speaks: it would warn of each optional input."""


class Params(ConvertParams):
    """As `convert.onnx_genai`, for the base's weights."""


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Convert `base` and every `adapter.NAME` into `out`; check each on the validation prompts of `data.NAME`.

    Raises:
        ModelError: an adapter of another base, or one that is no plain low-rank adapter.
        ConversionError: the architecture cannot be converted, an adapted layer is not in the graph, or the result does not
            agree with PyTorch.
    """
    import tempfile

    from slmops.convert import onnx_genai
    from slmops.engines import detect, fidelity, read_json

    base = inputs["base"]
    config = read_json(base / "config.json")
    onnx_genai.supported(config)
    sources = dict(sorted(named_inputs(inputs, "adapter").items()))
    for source in (base, *sources.values()):
        if detect(source) != "torch":
            raise ConversionError(f"{source} is not a Hugging Face model", "give the models as training wrote them")
    adapters = lora.read_all(sources, base, plain="cannot be switched on beside the base")
    places = {name: split(adapter, config) for name, adapter in adapters.items()}
    examples = fidelity.choose_for(sorted(adapters), named_inputs(inputs, "data"), params.fidelity_prompts)
    with tempfile.TemporaryDirectory(dir=ctx.scratch if ctx.scratch.is_dir() else None) as work:
        ctx.progress.start("building the graph")
        onnx_genai.build(base, Path(work), "fuse_qkv=false")
        ctx.progress.stop()
        layers = {layer: shape for found in places.values() for layer, (shape, _) in found.items()}
        written = onnx_genai.write(base, Path(work), out, params, change=lambda model: add_inputs(model, layers))
    finish(out, layers)
    entries = {name: write_adapter(adapter, places[name], out, name) for name, adapter in adapters.items()}
    manifest = {"base": next(iter(adapters.values())).base, "precision": params.precision, "adapters": entries}
    (out / ADAPTERS).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", "utf-8")
    agreed = fidelity.check_adapters(base, sources, out, examples, params.precision, params.min_token_agreement, ctx)
    facts: Facts = {
        "precision": params.precision,
        "model_bytes": sum(f.stat().st_size for f in out.glob("model.onnx*")),
        "adapter_bytes": {n: (out / about["file"]).stat().st_size for n, about in entries.items()},
        "token_agreement": {name: found["token_agreement"] for name, found in agreed.items()},
        "mean_kl": {name: found["mean_kl"] for name, found in agreed.items()},
    }
    return facts | written


Place = tuple[lora.Shape, tuple[str, slice]]
"""An adapted product of the graph: its shape, the layer that the adapter calls it, and which of its outputs."""


def split(adapter: lora.Adapter, config: Mapping[str, Any]) -> dict[str, Place]:
    """Adapted products by the graph's names of layers, in which packed ones are apart.

    Raises:
        ConversionError: a layer is of no kind that the graph has.
    """
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    keys = size * (config.get("num_key_value_heads") or heads)
    widths = {"qkv_proj": (size * heads, keys, keys), "gate_up_proj": (config["intermediate_size"],) * 2}
    found = {}
    for layer, shape in adapter.layers.items():
        if not (match := LAYER.fullmatch(layer)):
            raise ConversionError(
                f"{adapter.folder}: layer {layer} cannot be adapted in the graph",
                "train with train.lora.targets that name layers of the decoder's blocks",
            )
        block, _, last = layer.rpartition(".")
        start = 0
        parts = PACKED.get(last, (last,))
        for part, width in zip(parts, widths.get(match[3], (shape.outputs,)), strict=True):
            place = (layer, slice(start, start + width))
            found[f"{block}.{part}"] = (lora.Shape(shape.inputs, shape.rank, width), place)
            start += width
        if start != shape.outputs:
            raise ConversionError(f"{adapter.folder}: {layer} has {shape.outputs} outputs, the base {start}")
    return found


def inputs_of(layer: str) -> tuple[str, str]:
    """Names of the graph's inputs for A and B of a layer."""
    return f"{layer}.lora_A", f"{layer}.lora_B"


def add_inputs(model: Any, layers: Mapping[str, lora.Shape]) -> None:
    """Put x·A·B beside the product of each layer, in the model builder's graph.

    Raises:
        ConversionError: the graph has no such product.
    """
    from onnx import helper

    graph = model.graph
    wanted = {}
    for layer in layers:
        match = LAYER.fullmatch(layer)
        assert match is not None
        block = "attn" if match[2] == "self_attn" else "mlp"
        wanted[f"/model/layers.{match[1]}/{block}/{match[3]}/MatMul"] = layer
    nodes = []
    for node in graph.node:
        nodes.append(node)
        layer = wanted.pop(node.name, "") if node.op_type == "MatMul" else ""
        if not layer:
            continue
        result = node.output[0]
        plain, low, added = (f"{result}/{part}" for part in ("plain", "low", "added"))
        node.output[0] = plain
        a, b = inputs_of(layer)
        nodes.append(helper.make_node("MatMul", [node.input[0], a], [low], f"{node.name}/A"))
        nodes.append(helper.make_node("MatMul", [low, b], [added], f"{node.name}/B"))
        nodes.append(helper.make_node("Add", [plain, added], [result], f"{node.name}/Add"))
        graph.input.append(helper.make_tensor_value_info(a, 1, [layers[layer].inputs, f"{layer}.rank"]))
        graph.input.append(helper.make_tensor_value_info(b, 1, [f"{layer}.rank", layers[layer].outputs]))
    if wanted:
        raise ConversionError(
            f"the graph has no product for {sorted(wanted.values())[0]}", "train with other train.lora.targets"
        )
    del graph.node[:]
    graph.node.extend(nodes)


def finish(out: Path, layers: Mapping[str, lora.Shape]) -> None:
    """Give the inputs their defaults, of rank 0, in the written graph; and keep the runtime from warning of them."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(out / "model.onnx", load_external_data=False)
    for layer, shape in layers.items():
        a, b = inputs_of(layer)
        model.graph.initializer.append(numpy_helper.from_array(np.zeros((shape.inputs, 0), np.float32), a))
        model.graph.initializer.append(numpy_helper.from_array(np.zeros((0, shape.outputs), np.float32), b))
    onnx.save(model, out / "model.onnx")
    path = out / "genai_config.json"
    settings = json.loads(path.read_text("utf-8"))
    settings["model"]["decoder"].setdefault("session_options", {})["log_severity_level"] = QUIET
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def write_adapter(adapter: lora.Adapter, places: Mapping[str, Place], out: Path, name: str) -> dict[str, Any]:
    """Write the runtime's file of one adapter, with the scale in B; returns its entry in the manifest."""
    import numpy as np
    import onnxruntime

    weights = adapter.weights()
    arrays: Arrays = {}
    for layer, (_, (source, rows)) in places.items():
        a, b = weights[source]
        for key, value in zip(inputs_of(layer), (a.T, b[rows].T * np.float32(adapter.scale)), strict=True):
            arrays[key] = np.ascontiguousarray(value, np.float32)
    file = out / "adapters" / f"{name}.onnx_adapter"
    file.parent.mkdir(exist_ok=True)
    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    form.set_parameters({key: onnxruntime.OrtValue.ortvalue_from_numpy(value) for key, value in arrays.items()})
    form.export_adapter(str(file))
    return {
        "file": f"adapters/{file.name}",
        "digest": digest_file(file),
        "weights": digest_file(adapter.folder / lora.WEIGHTS),
        "base": adapter.base,
        "tuning": adapter.tuning,
        "rank": adapter.rank,
        "scale": adapter.scale,
        "targets": list(adapter.targets),
    }
