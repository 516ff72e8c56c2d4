"""Method `convert.openvino`: a Hugging Face model becomes a folder that OpenVINO runs, graph and weights, checked at once.

Architectures: llama, qwen3, phi3, gemma3_text. The graph is written operation by operation (`openvino_graph`), with keys and values as
state. Weights are fp32, or fp16; or matrices are int8 with one scale a row, or int4 with one for each `block_size` (a matrix whose rows
are no multiple of that is int8), rounded by the same rule as in ONNX (`rounding`): weights that `compress.gptq` has rounded stay as
they are. Scales are float16; norms, biases and rotary speeds are float32.

Of a phi3 the context ends at its attention window and at the first context of long rotary factors. The result is run in OpenVINO and
compared with torch (`fidelity`), as every conversion is. The same folder gives the same bytes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from slmops.convert import gguf, openvino_graph
from slmops.core import runtimes
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive
from slmops.engines import detect, fidelity, read_json
from slmops.engines.openvino import FILE
from slmops.engines.plain_tokenizer import FILES
from slmops.errors import ConversionError, MissingExtraError

DECLARATION = Declaration(
    name="convert.openvino",
    version="1",
    makes="model",
    takes={"model": "model", "data": "dataset"},
    extra="openvino",
    packages=("openvino", "numpy", "torch", "transformers"),
)


class Params(BaseParams):
    """`rounding` and `embedding_precision` as in `convert.onnx_genai`; `block_size`: weights that share a scale in int4."""

    precision: Literal["fp32", "fp16", "int8", "int4"] = "int4"
    block_size: Literal[16, 32, 64, 128] = 32
    rounding: Literal["search", "plain"] = "search"
    embedding_precision: Literal["int8", "int4"] | None = None
    fidelity_prompts: Positive = 32
    min_token_agreement: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Convert `inputs["model"]` into `out` and check it on validation prompts of `inputs["data"]`.

    Raises:
        ConversionError: the model cannot be written so, or OpenVINO does not agree with torch.
        MissingExtraError: OpenVINO is not installed.
    """
    source = inputs["model"]
    if detect(source) != "torch":
        raise ConversionError(f"{source} is not a Hugging Face model", "convert the trained model, not a converted one")
    config = read_json(source / "config.json")
    refusal = runtimes.openvino(config)
    if refusal:
        raise ConversionError(*refusal)
    examples = fidelity.choose(inputs["data"], params.fidelity_prompts)
    ctx.progress.start("writing for OpenVINO")
    written = write(source, config, out, params)
    ctx.progress.stop()
    if written["in_int8"]:
        ctx.progress.log(
            f"{len(written['in_int8'])} matrices are in int8: their rows are no multiple of {params.block_size} weights"
        )
    found = fidelity.check(source, out, examples, params.precision, params.min_token_agreement, ctx)
    return {
        "precision": params.precision, **written,
        "model_bytes": sum(file.stat().st_size for file in out.glob("openvino_model.*")),
        "token_agreement": found["token_agreement"], "mean_kl": found["mean_kl"],
    }  # fmt: skip


def write(source: Path, config: dict[str, Any], out: Path, params: Params) -> Facts:
    """Write graph, weights, settings and tokenizer; the names of matrices that are in int8 though int4 is asked for."""
    try:
        import openvino as ov
    except ImportError as error:
        raise MissingExtraError("OpenVINO", "openvino") from error
    found = gguf.checked(config, dict(gguf.stored(source)), "the graph")
    weights = openvino_graph.Weights(
        lambda name: found[name].read(), params.precision, params.embedding_precision or params.precision,
        params.block_size, params.rounding == "search",
    )  # fmt: skip
    model = openvino_graph.build(config, weights)
    if params.precision == "fp32":
        model.set_rt_info("f32", ["runtime_options", "KV_CACHE_PRECISION"])
    with tempfile.TemporaryDirectory() as work:
        if params.precision == "fp16":
            model = openvino_graph.halved(model, Path(work))
        ov.save_model(model, out / FILE, compress_to_fp16=False)
    for name in ("config.json", *FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    return {"rounded": weights.rounded, "in_int8": weights.in_int8}
