"""Method `convert.gguf_lora`: one base and N low-rank adapters as GGUF, which llama.cpp switches while the base is loaded.

The base is written as by `convert.gguf`, unless `base: none` leaves it out. An adapter's file is what llama.cpp's own
convert_lora_to_gguf.py writes: `general.type` adapter, `adapter.type` lora, `adapter.lora.alpha`, and
`blk.N.….weight.lora_a` (rank, inputs) and `.lora_b` (outputs, rank) for every adapted layer. llama.cpp multiplies B·A by
alpha / rank, so alpha is written as scale · rank, which is right for rslora too. B's rows follow those of the base
(`gguf_names`). A dora is no sum of that form and is refused.

Law: llama.cpp with an adapter switched on gives the tokens of torch with that adapter; with none, those of the base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from slmops.convert import gguf as base_gguf
from slmops.convert import gguf_names
from slmops.core.digest import digest_file
from slmops.core.method import Context, Declaration, Facts, named_inputs
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive
from slmops.engines import fidelity, read_json
from slmops.engines.adapters import ADAPTERS
from slmops.errors import ConversionError
from slmops.store import lora

DECLARATION = Declaration(
    name="convert.gguf_lora",
    version="2",
    makes="model",
    takes={"base": "model", "adapter*": "model", "data*": "dataset"},
    extra="llamacpp",
    packages=("gguf", "numpy", "safetensors", "llama-cpp-python", "torch", "transformers"),
)

BASE_DIGEST = "slmops.base"
"""Key of the file's metadata: digest of the base that the adapter belongs to."""


class Params(BaseParams):
    """`precision` of the adapters' weights; `base`: that of the base's matrices, `none` to leave the base out."""

    precision: Literal["fp32", "fp16"] = "fp32"
    base: Literal["none"] | base_gguf.Precision | base_gguf.Quantized = "fp16"
    fidelity_prompts: Positive = 32
    min_token_agreement: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write `model.gguf`, `adapters/NAME.gguf` for every input `adapter.NAME`, and `adapters.json` with digests.

    Where there is an input `data.NAME` for each, the base and every adapter are run in llama.cpp on its validation prompts and
    compared with torch.

    Raises:
        ModelError: an adapter of another base, or one that is no plain low-rank adapter.
        ConversionError: an architecture, a tokenizer or a layer that cannot be written, or llama.cpp does not agree with torch.
        MissingExtraError: `gguf` is not installed, or llama.cpp where it is needed.
    """
    gguf_names.library()
    base = inputs["base"]
    config = read_json(base / "config.json")
    folders, data = dict(sorted(named_inputs(inputs, "adapter").items())), named_inputs(inputs, "data")
    examples = fidelity.choose_for(list(folders), data, params.fidelity_prompts) if data else {}
    adapters = lora.read_all(folders, base, plain="has no GGUF form")
    names = {name: tensor_names(adapter, config) for name, adapter in adapters.items()}
    facts: Facts = {}
    if params.base != "none":
        facts["base"] = base_gguf.run(base_gguf.Params(precision=params.base), {"model": base}, out, ctx)
    (out / "adapters").mkdir()
    entries: dict[str, Any] = {}
    for name, adapter in adapters.items():
        file = out / "adapters" / f"{name}.gguf"
        write(adapter, names[name], config, file, name, params)
        entries[name] = {
            "file": f"adapters/{file.name}", "digest": digest_file(file),
            "weights": digest_file(adapter.folder / lora.WEIGHTS), "tuning": adapter.tuning, "rank": adapter.rank,
            "scale": adapter.scale, "targets": list(adapter.targets),
        }  # fmt: skip
    manifest = {"base": lora.base_digest(base), "precision": params.precision, "adapters": entries}
    (out / ADAPTERS).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", "utf-8")
    sizes = {name: (out / entry["file"]).stat().st_size for name, entry in entries.items()}
    if examples and params.base != "none":
        found = fidelity.check_adapters(base, folders, out, examples, params.base, params.min_token_agreement, ctx)
        facts["token_agreement"] = {name: value["token_agreement"] for name, value in found.items()}
    return facts | {"adapters": len(entries), "bytes": sizes}


def tensor_names(adapter: lora.Adapter, config: Mapping[str, Any]) -> dict[str, str]:
    """Layer to the name of its weight in GGUF.

    Raises:
        ConversionError: see `run`.
    """
    gguf_names.supported(config)
    name_of = gguf_names.namer(config)
    found = {}
    for layer in adapter.layers:
        name = name_of(layer)
        if name is None:
            raise ConversionError(f"{adapter.folder}: GGUF has no name for layer {layer}", "train with other targets")
        found[layer] = f"{name}.weight"
    return found


def write(
    adapter: lora.Adapter, names: Mapping[str, str], config: Mapping[str, Any], file: Path, name: str, params: Params
) -> None:  # fmt: skip
    """Write one adapter's file."""
    import numpy as np

    gguf = gguf_names.library()
    writer = gguf.GGUFWriter(file, gguf_names.architecture(config))
    half = params.precision == "fp16"
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.scale * adapter.rank)
    writer.add_string(BASE_DIGEST, adapter.base)
    for layer, (a, b) in adapter.weights().items():
        b = gguf_names.rows(b, layer, config)
        for end, matrix in (("lora_a", a), ("lora_b", b)):
            kept = np.ascontiguousarray(matrix, np.float16 if half else np.float32)
            writer.add_tensor(f"{names[layer]}.{end}", kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
