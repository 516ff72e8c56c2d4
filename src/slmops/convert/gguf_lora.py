"""Method `convert.gguf_lora`: low-rank adapters as GGUF files, which llama.cpp loads beside a base (`--lora FILE`).

The file is what llama.cpp's own convert_lora_to_gguf.py writes: `general.type` adapter, `adapter.type` lora,
`adapter.lora.alpha`, and `blk.N.….weight.lora_a` (rank, inputs) and `.lora_b` (outputs, rank) for every adapted layer.
llama.cpp multiplies B·A by alpha / rank, so alpha is written as scale · rank, which is right for rslora too.

In GGUF, llama's query and key rows stand in another order than in Hugging Face (the two halves of a rotary pair side by
side), and B's rows with them; other architectures keep theirs.

Law: W + alpha / rank · B·A of the file is the merged weight as llama.cpp's converter would lay it out. slmops does not
run llama.cpp itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slmops.core.digest import digest_file
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.errors import ConversionError, MissingExtraError
from slmops.store import lora

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

DECLARATION = Declaration(
    name="convert.gguf_lora",
    version="1",
    makes="adapters",
    takes={"base": "model", "adapter*": "model"},
    extra="gguf",
    packages=("gguf", "numpy", "safetensors"),
)

ARCHITECTURES = {"llama": "LLAMA", "qwen3": "QWEN3", "phi3": "PHI3", "gemma3_text": "GEMMA3"}
"""model_type of Hugging Face to llama.cpp's architecture."""
BASE_DIGEST = "slmops.base"
"""Key of the file's metadata: digest of the base that the adapter belongs to."""


class Params(BaseParams):
    """`precision` of the adapter's weights in the file."""

    precision: Literal["fp32", "fp16"] = "fp32"


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write `NAME.gguf` for every input `adapter.NAME`, and `adapters.json` with digests.

    Raises:
        ModelError: an adapter of another base, or one that is no plain low-rank adapter.
        ConversionError: an architecture or a layer that is not known here.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error
    from slmops.engines import read_json

    base = inputs["base"]
    config = read_json(base / "config.json")
    folders = {name.partition(".")[2]: path for name, path in inputs.items() if name.startswith("adapter.")}
    adapters = lora.read_all(folders, base, plain="has no GGUF form")
    names = {name: tensor_names(adapter, config) for name, adapter in adapters.items()}
    entries: dict[str, Any] = {}
    for name, adapter in adapters.items():
        file = out / f"{name}.gguf"
        write(adapter, names[name], config, file, name, params)
        entries[name] = {
            "file": file.name, "digest": digest_file(file), "weights": digest_file(adapter.folder / lora.WEIGHTS),
            "tuning": adapter.tuning, "rank": adapter.rank, "scale": adapter.scale, "targets": list(adapter.targets),
        }  # fmt: skip
    manifest = {"base": lora.base_digest(base), "precision": params.precision, "adapters": entries}
    (out / "adapters.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", "utf-8")
    return {"adapters": len(entries), "bytes": {name: (out / e["file"]).stat().st_size for name, e in entries.items()}}


def tensor_names(adapter: lora.Adapter, config: Mapping[str, Any]) -> dict[str, str]:
    """Layer to the name of its weight in GGUF.

    Raises:
        ConversionError: see `run`.
    """
    import gguf

    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ConversionError(f"adapters of {kind} cannot be written as GGUF", f"those of these can: {known}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[kind]], config["num_hidden_layers"])
    found = {}
    for layer in adapter.layers:
        name = names.get_name(layer)
        if name is None:
            raise ConversionError(f"{adapter.folder}: GGUF has no name for layer {layer}", "train with other targets")
        found[layer] = f"{name}.weight"
    return found


def permute(rows: Matrix, heads: int) -> Matrix:
    """Rows (outputs, …) of llama's query or key projection in the order of GGUF."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write(
    adapter: lora.Adapter, names: Mapping[str, str], config: Mapping[str, Any], file: Path, name: str, params: Params
) -> None:  # fmt: skip
    """Write one adapter's file."""
    import gguf
    import numpy as np

    architecture = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[ARCHITECTURES[config["model_type"]]]]
    writer = gguf.GGUFWriter(file, architecture)
    half = params.precision == "fp16"
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.scale * adapter.rank)
    writer.add_string(BASE_DIGEST, adapter.base)
    queries = config["num_attention_heads"]
    heads = {"q_proj": queries, "k_proj": config.get("num_key_value_heads") or queries}
    for layer, (a, b) in adapter.weights().items():
        last = layer.rpartition(".")[2]
        if config["model_type"] == "llama" and last in heads:
            b = permute(b, heads[last])
        for end, matrix in (("lora_a", a), ("lora_b", b)):
            kept = np.ascontiguousarray(matrix, np.float16 if half else np.float32)
            writer.add_tensor(f"{names[layer]}.{end}", kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
