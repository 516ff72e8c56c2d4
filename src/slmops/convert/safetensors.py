"""Method `convert.safetensors`: a Hugging Face model becomes the same folder with its weights in bf16 or fp16, as vLLM serves it.

Nothing but the type of the weights changes: config.json names it (`dtype`, and `torch_dtype` for older readers), tokenizer, chat template
and generation_config.json come along. So the folder also suits whatever else reads Hugging Face models, such as SGLang.

The result is loaded in transformers and compared with torch (`fidelity`), which computes in float32: what is judged is what the rounding of
the weights changes, not the arithmetic of a server, which is in the type of the weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from slmops.core import runtimes
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive
from slmops.engines import detect, fidelity, read_json
from slmops.engines.plain_tokenizer import end_ids
from slmops.engines.tokenizer import TOKENIZER_FILES
from slmops.errors import ConversionError, MissingExtraError

DECLARATION = Declaration(
    name="convert.safetensors",
    version="1",
    makes="model",
    takes={"model": "model", "data": "dataset"},
    extra="train",
    packages=("safetensors", "torch", "transformers"),
)

TYPES = {"bf16": "bfloat16", "fp16": "float16"}
INDEX = "model.safetensors.index.json"


class Params(BaseParams):
    """`precision` of all weights."""

    precision: Literal["bf16", "fp16"] = "bf16"
    fidelity_prompts: Positive = 32
    min_token_agreement: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write `inputs["model"]` into `out` and check it on validation prompts of `inputs["data"]`.

    Raises:
        ConversionError: the model is quantised already, or a weight is too large for the type.
    """
    source = inputs["model"]
    if detect(source) != "torch":
        raise ConversionError(f"{source} is not a Hugging Face model", "convert the trained model, not a converted one")
    config = read_json(source / "config.json")
    refusal = runtimes.safetensors(config)
    if refusal:
        raise ConversionError(*refusal)
    examples = fidelity.choose(inputs["data"], params.fidelity_prompts)
    tensors = write(source, config, out, TYPES[params.precision])
    found = fidelity.check(source, out, examples, params.precision, params.min_token_agreement, ctx)
    return {
        "precision": params.precision, "tensors": tensors,
        "model_bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "token_agreement": found["token_agreement"], "mean_kl": found["mean_kl"],
    }  # fmt: skip


def write(source: Path, config: Mapping[str, Any], out: Path, kind: str) -> int:
    """Write the folder, one file of weights in memory at a time. Returns the number of tensors."""
    try:
        import torch
        from safetensors.torch import load_file, save_file
    except ImportError as error:
        raise MissingExtraError("PyTorch with safetensors", "train") from error
    wanted = getattr(torch, kind)
    places: dict[str, str] = {}
    total = 0
    for file in sorted(source.glob("*.safetensors")):
        weights = load_file(file)
        for name, tensor in weights.items():
            if not tensor.is_floating_point():
                continue
            weights[name] = tensor.to(wanted)
            if not torch.isfinite(weights[name]).all():
                raise ConversionError(f"{name} has values that {kind} cannot hold", "take safetensors-bf16")
        save_file(weights, out / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(weights, file.name)
        total += sum(tensor.nbytes for tensor in weights.values())
    if len(set(places.values())) > 1:
        _dump(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    _dump(out / "config.json", dict(config) | {"dtype": kind, "torch_dtype": kind})
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if not (out / "generation_config.json").is_file():
        from slmops.engines.tokenizer import load_tokenizer

        _dump(
            out / "generation_config.json",
            {"eos_token_id": sorted(end_ids(source, dict(config), load_tokenizer(source).eos_token_id))},
        )
    return len(places)


def _dump(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
