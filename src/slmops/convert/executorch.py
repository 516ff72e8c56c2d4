"""Method `convert.executorch`: a Hugging Face model becomes `model.pte`, which ExecuTorch runs on phones, checked at once.

Architectures: llama, qwen3, phi3, gemma3_text. The decoder is written in operations of torch (`executorch_graph`), exported, and given to
XNNPACK, the runtime's code for processors, as far as it has the operations. Weights are fp32; or matrices are int8 with one scale a row, or
int4 with one for each `block_size` (a matrix whose rows are no multiple of that is int8). XNNPACK wants scales above zero, in bfloat16
for int4: another grid than that of ONNX (`rounding`). Weights that `compress.gptq` has put on that one are rounded once more, and change
little: most where a group's scale was negative, whose largest weight has no code here.

The file is what the runtime's own runner for text takes: `forward(tokens, start)`, and beside it methods that say how long the context is,
which tokens end an answer and so on. It holds keys and values for `context` tokens at most. A tied table of tokens is in the file twice, as
the table and, in XNNPACK's layout, as the output matrix.

Of a phi3 the context ends at its attention window and at the first context of long rotary factors. The result is run in ExecuTorch and
compared with torch (`fidelity`), as every conversion is. The same folder gives the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from slmops.convert import executorch_graph, gguf
from slmops.core import runtimes
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive
from slmops.engines import detect, executorch_export, fidelity, read_json
from slmops.engines.executorch import FILE
from slmops.engines.plain_tokenizer import FILES, PlainTokenizer, end_ids
from slmops.errors import ConversionError, MissingExtraError

DECLARATION = Declaration(
    name="convert.executorch",
    version="1",
    makes="model",
    takes={"model": "model", "data": "dataset"},
    extra="executorch",
    packages=("executorch", "torchao", "numpy", "torch", "transformers"),
)


class Params(BaseParams):
    """`block_size`: weights that share a scale in int4; `embedding_precision` as in `convert.onnx_genai`; `context`: the most tokens that
    keys and values have room for."""

    precision: Literal["fp32", "int8", "int4"] = "int4"
    block_size: Literal[32, 64, 128] = 32
    embedding_precision: Literal["int8", "int4"] | None = None
    context: Positive = 2048
    fidelity_prompts: Positive = 32
    min_token_agreement: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Convert `inputs["model"]` into `out` and check it on validation prompts of `inputs["data"]`.

    Raises:
        ConversionError: the model cannot be written so, or ExecuTorch does not agree with torch.
        MissingExtraError: ExecuTorch is not installed.
    """
    source = inputs["model"]
    if detect(source) != "torch":
        raise ConversionError(f"{source} is not a Hugging Face model", "convert the trained model, not a converted one")
    config = read_json(source / "config.json")
    refusal = runtimes.executorch(config)
    if refusal:
        raise ConversionError(*refusal)
    examples = fidelity.choose(inputs["data"], params.fidelity_prompts)
    if params.context < runtimes.context(config):
        ctx.progress.log(f"the context ends at {params.context} of {runtimes.context(config)} tokens")
    ctx.progress.start("writing for ExecuTorch")
    written = write(source, config, out, params)
    ctx.progress.stop()
    if written["in_int8"]:
        ctx.progress.log(
            f"{len(written['in_int8'])} matrices are in int8: their rows are no two or more groups of {params.block_size} weights"
        )
    found = fidelity.check(source, out, examples, params.precision, params.min_token_agreement, ctx)
    return {
        "precision": params.precision, **written, "model_bytes": (out / FILE).stat().st_size,
        "token_agreement": found["token_agreement"], "mean_kl": found["mean_kl"],
    }  # fmt: skip


def write(source: Path, config: dict[str, Any], out: Path, params: Params) -> Facts:
    """Write program, settings and tokenizer; the names of matrices that are in int8 though int4 is asked for."""
    found = gguf.checked(config, dict(gguf.stored(source)), "the graph")
    weights = executorch_graph.Weights(
        lambda name: found[name].read(),
        params.precision,
        params.embedding_precision or params.precision,
        params.block_size,
    )
    context = min(runtimes.context(config), params.context)
    for name in ("config.json", *FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    with executorch_export.quiet():
        try:
            import executorch.exir  # noqa: F401
            import torch
        except ImportError as error:
            raise MissingExtraError("ExecuTorch", "executorch") from error
        decoder = executorch_graph.build(config, weights, context)
        with torch.no_grad():
            program = executorch_export.lowered(decoder, context, said(out, config, context))
    with (out / FILE).open("wb") as file:
        program.write_to_file(file)
    return {"rounded": weights.rounded, "in_int8": weights.in_int8, "context": context}


def said(folder: Path, config: Mapping[str, Any], context: int) -> dict[str, Any]:
    """What the runner asks a program for, by the method that answers."""
    tokenizer = PlainTokenizer(folder, "executorch")
    ends = sorted(end_ids(folder, dict(config), tokenizer.id_of(tokenizer.marks.get("eos_token", ""))))
    begin = config.get("bos_token_id")
    return {
        "get_max_seq_len": context, "get_max_context_len": context, "get_vocab_size": config["vocab_size"], "get_eos_ids": ends,
        "get_n_layers": config["num_hidden_layers"], "use_kv_cache": True, "use_sdpa_with_kv_cache": True, "enable_dynamic_shape": True,
    } | ({"get_bos_id": begin} if isinstance(begin, int) else {})  # fmt: skip
