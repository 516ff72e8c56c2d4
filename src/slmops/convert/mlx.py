"""Method `convert.mlx`: a Hugging Face model becomes a folder in the layout of mlx-lm, by mlx-lm's own functions, checked at once.

Architectures: llama, qwen3, phi3, gemma3_text. Weights are of one floating type, or matrices are int8 or int4 in groups of `block_size`
with a scale and an offset in float16 (the rest is float16). They are rounded by the same rule as in ONNX (`rounding`), not by MLX, so
that weights which `compress.gptq` has rounded stay as they are. A matrix whose rows are no multiple of the group stays float16; a
model in which all do is refused. The folder loads with `mlx_lm.load` and runs on any Mac with Apple silicon.

Weights that change: the norms after each part of a gemma3, where mlx-lm's factor of its embeddings is not torch's (`_rescale`).

What config.json says anew: rotary settings in the flat form, which is all that mlx-lm reads of most architectures; every which layer of a
gemma3 sees all. Of a phi3 with long rotary factors mlx-lm takes the long ones at any length, where torch takes the short ones up
to the first context: the folder has the short ones as both, and its context ends there.

The result is run in MLX and compared with torch (`fidelity`), as every conversion is. The same folder gives the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from slmops.convert.rounding import round_matrix
from slmops.core import runtimes
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive
from slmops.engines import detect, fidelity, read_json
from slmops.engines.mlx import library
from slmops.engines.plain_tokenizer import FILES
from slmops.errors import ConversionError

DECLARATION = Declaration(
    name="convert.mlx",
    version="1",
    makes="model",
    takes={"model": "model", "data": "dataset"},
    extra="mlx",
    packages=("mlx", "mlx-lm", "torch", "transformers"),
)

TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "float16", "int4": "float16"}
BITS = {"int8": 8, "int4": 4}


class Params(BaseParams):
    """`rounding` and `embedding_precision` as in `convert.onnx_genai`; `block_size`: weights that share a scale and an offset."""

    precision: Literal["fp32", "fp16", "bf16", "int8", "int4"] = "int4"
    block_size: Literal[32, 64, 128] = 32
    rounding: Literal["search", "plain"] = "search"
    embedding_precision: Literal["int8", "int4"] | None = None
    fidelity_prompts: Positive = 32
    min_token_agreement: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Convert `inputs["model"]` into `out` and check it on validation prompts of `inputs["data"]`.

    Raises:
        ConversionError: MLX cannot take the model, or does not agree with torch.
        MissingExtraError: MLX is not installed.
    """
    source = inputs["model"]
    if detect(source) != "torch":
        raise ConversionError(f"{source} is not a Hugging Face model", "convert the trained model, not a converted one")
    config = read_json(source / "config.json")
    refusal = runtimes.mlx(config)
    if refusal:
        raise ConversionError(*refusal)
    examples = fidelity.choose(inputs["data"], params.fidelity_prompts)
    widths = (config["hidden_size"], config["intermediate_size"])
    unfit = runtimes.mlx_groups(widths, params.block_size) if params.precision in BITS else None
    if unfit:
        raise ConversionError(*unfit)
    rounded, kept = write(source, settings(config), out, params)
    if kept:
        ctx.progress.log(
            f"{len(kept)} of {len(kept) + rounded} matrices stay fp16: their rows are no multiple of {params.block_size} weights"
        )
    found = fidelity.check(source, out, examples, params.precision, params.min_token_agreement, ctx)
    return {
        "precision": params.precision, "rounded": rounded, "kept_fp16": kept,
        "model_bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "token_agreement": found["token_agreement"], "mean_kl": found["mean_kl"],
    }  # fmt: skip


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as mlx-lm reads it."""
    kind, rotary = config["model_type"], runtimes.rotary(config)
    heads, found = config["num_attention_heads"], dict(config)
    found.pop("rope_parameters", None)
    kept = ("rope_theta", "partial_rotary_factor", "rope_type", "type")
    scaling = {name: value for name, value in rotary.items() if name not in kept}
    scaling |= {"type": rotary["rope_type"], "rope_type": rotary["rope_type"]}
    if rotary["rope_type"] == "longrope":
        first = runtimes.first_context(config)
        scaling |= {"long_factor": rotary["short_factor"], "original_max_position_embeddings": first}
        found["original_max_position_embeddings"] = first
    found |= {
        "rope_theta": rotary["rope_theta"],
        "rope_scaling": None if rotary["rope_type"] == "default" else scaling,
        "partial_rotary_factor": rotary["partial_rotary_factor"],
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", kind == "gemma3_text")),
    }  # fmt: skip
    if kind == "gemma3_text":
        found |= {
            "rope_local_base_freq": runtimes.rotary(config, "sliding_attention")["rope_theta"],
            "sliding_window_pattern": runtimes.window_pattern(config),
            "sliding_window": config.get("sliding_window") or 4096,
            "query_pre_attn_scalar": config.get("query_pre_attn_scalar") or 256,
        }
    return found


def write(source: Path, config: dict[str, Any], out: Path, params: Params) -> tuple[int, list[str]]:
    """Write weights, settings and tokenizer.

    Returns:
        How many matrices are rounded, and the names of those that are not though `precision` asks for it.
    """
    mx, utils = library()
    from mlx.utils import tree_map

    precision, kept = params.precision, list[str]()
    kind, bits = getattr(mx, TYPES[precision]), BITS.get(precision)

    def how(path: str, module: Any) -> bool | dict[str, Any]:
        table = path.rpartition(".")[2] in ("embed_tokens", "lm_head") and params.embedding_precision == "int8"
        return {"group_size": params.block_size, "bits": 8, "mode": "affine"} if table else True

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model, _ = utils.load_model(source, lazy=True, model_config={"rope_parameters": None} | config)
            if config["model_type"] == "gemma3_text":
                _rescale(model, config["hidden_size"])
            whole = {name: one.weight for name, one in model.named_modules() if hasattr(one, "to_quantized")}
            model.update(
                tree_map(lambda w: w.astype(kind) if mx.issubdtype(w.dtype, mx.floating) else w, model.parameters())
            )
            if bits:
                model, config = utils.quantize_model(model, config, params.block_size, bits, quant_predicate=how)
                kept = sorted(_round(model, whole, params.rounding == "search"))
            utils.save_model(out, model)
    except Exception as error:
        raise ConversionError(f"mlx-lm failed: {type(error).__name__}: {error}", "convert another model") from error
    config.pop("torch_dtype", None)
    utils.save_config(config | {"dtype": TYPES[precision]}, out / "config.json")
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    return (len(whole) - len(kept) if bits else 0), kept


def _rescale(model: Any, hidden: int) -> None:
    """mlx-lm rounds the factor of gemma3's embeddings to bfloat16. What the layers add is multiplied by the same error, which the norm at
    the end takes out again."""
    import mlx.core as mx

    error = mx.array(hidden**0.5, mx.bfloat16).item() / hidden**0.5
    for layer in model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):  # which multiply by weight + 1
            norm.weight = (norm.weight.astype(mx.float32) + 1) * error - 1


def _round(model: Any, whole: Mapping[str, Any], search: bool) -> list[str]:
    """Put codes, scales and offsets of our rule in the place of MLX's. A value is code · scale + offset, codes from 0 on.

    Args:
        whole: matrices by name, as they were before.

    Returns:
        Names of those that MLX does not round.
    """
    import mlx.core as mx
    import numpy as np

    kept = []
    for name, one in model.named_modules():
        if name in whole and not hasattr(one, "bits"):
            kept.append(name)
        elif name in whole:
            values = np.array(whole[name].astype(mx.float32))
            found = round_matrix(values, one.bits, one.group_size, search=search)
            packed = np.ascontiguousarray(found.packed().reshape(len(values), -1)).view(np.uint32)
            one.weight, one.scales = mx.array(packed), mx.array(found.scales)
            one.biases = mx.array(found.scales * np.float16(-(1 << (one.bits - 1))))
    return kept
