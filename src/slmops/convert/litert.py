"""Method `convert.litert`: a Hugging Face model becomes a folder that LiteRT runs, on phones too, checked at once.

Architectures: llama, qwen3, phi3, gemma3_text. litert-torch (https://github.com/google-ai-edge/litert-torch) turns a decoder of plain
operations (`litert_tool`) into `model.tflite`, in an environment of its own, with one signature for one token and some for many; keys
and values go in and out. `model.litertlm` is the same with tokenizer, chat template and stop tokens, as LiteRT-LM takes it.

Weights are fp32; or matrices are int8 with one scale a row, or int4 with one for each `block_size` (a matrix whose rows are no
multiple of that is int8), and what goes into such a product is rounded to int8 as it comes, row by row (dynamic range). Scales are
positive here, where those of ONNX have the sign of the largest weight. So `signed` rounds by the least squared error among positive
scales: weights that `compress.gptq` has rounded keep their values where the scale was positive; elsewhere a largest weight of 8 steps
becomes 7 of a scale that is a little greater.

The context is that of the model, at most 4,096 tokens, for which there is room in keys and values from the first. The result is run in
LiteRT and compared with torch (`fidelity`), as every conversion is. The same folder gives the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from slmops.convert import gguf
from slmops.convert.rounding import AT_ONCE, CANDIDATES
from slmops.core import runtimes
from slmops.core.environment import Environment, requirements
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive
from slmops.engines.plain_tokenizer import FILES, PlainTokenizer, chat_template, end_ids
from slmops.errors import ConversionError, ToolError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ENVIRONMENT = Environment(
    "litert", requirements(Path(__file__).with_name("litert.txt").read_text(encoding="utf-8")), size=2_100_000_000
)
DECLARATION = Declaration(
    name="convert.litert",
    version="1",
    makes="model",
    takes={"model": "model", "data": "dataset"},
    extra="litert",
    packages=("ai-edge-litert", "numpy", "torch", "transformers"),
    environment=ENVIRONMENT,
)
LONGEST = 4096
"""Tokens that keys and values have room for at most: the room is there from the first, and a call goes over all of it."""
PREFILL = (32, 128)
"""Tokens that the signatures for many take."""
TEXTS = (
    "{% set plain = namespace(messages=[]) %}{% for m in messages %}{% if m['content'] is string %}"
    "{% set plain.messages = plain.messages + [m] %}{% else %}{% set plain.text = '' %}{% for part in m['content'] %}"
    "{% set plain.text = plain.text + part['text'] %}{% endfor %}"
    "{% set plain.messages = plain.messages + [dict(m, content=plain.text)] %}{% endif %}{% endfor %}"
    "{% set messages = plain.messages %}"
)
"""Before a chat template: LiteRT-LM gives what a message says as a list of parts, where templates of text models look for a string."""
TOOL = Path(__file__).with_name("litert_tool.py")


class Params(BaseParams):
    """`embedding_precision` as in `convert.onnx_genai`; `block_size`: weights that share a scale in int4."""

    precision: Literal["fp32", "int8", "int4"] = "int4"
    block_size: Literal[32, 64, 128] = 32
    embedding_precision: Literal["int8", "int4"] | None = None
    fidelity_prompts: Positive = 32
    min_token_agreement: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Convert `inputs["model"]` into `out` and check it on validation prompts of `inputs["data"]`.

    Raises:
        ConversionError: the model cannot be written so, the tool failed, or LiteRT does not agree with torch.
        MissingExtraError: LiteRT is not installed.
        ToolError: the tool's environment cannot be made.
    """
    from slmops.engines import detect, fidelity, litert, read_json
    from slmops.store.files import remove_tree

    source = inputs["model"]
    if detect(source) != "torch":
        raise ConversionError(f"{source} is not a Hugging Face model", "convert the trained model, not a converted one")
    config = read_json(source / "config.json")
    refusal = runtimes.litert(config)
    if refusal:
        raise ConversionError(*refusal)
    found = gguf.checked(config, dict(gguf.stored(source)), "the graph")
    litert.libraries()
    examples = fidelity.choose(inputs["data"], params.fidelity_prompts)
    made = plan(config)
    if made["context"] < runtimes.context(config):
        ctx.progress.log(f"the context ends at {made['context']} of {runtimes.context(config)} tokens")
    work = ctx.scratch / "litert"
    remove_tree(work)
    work.mkdir(parents=True)
    bits, narrow = _round(found, params, work / "rounded.safetensors")
    if narrow:
        ctx.progress.log(
            f"{len(narrow)} matrices are in int8: their rows are no multiple of {params.block_size} weights"
        )
    for name in ("config.json", *FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    job = {
        "plan": made, "weights": sorted({str(tensor.file.absolute()) for tensor in found.values()}), "tensors": sorted(found),
        "bits": bits, "rounded": str(work / "rounded.safetensors"), "work": str(work), "out": str(out.absolute()),
        "stop": sorted(_ends(out, config)), "template": TEXTS + chat_template(out),
    }  # fmt: skip
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    _tool(work, ctx)
    remove_tree(work)
    agreed = fidelity.check(source, out, examples, params.precision, params.min_token_agreement, ctx)
    return {
        "precision": params.precision, "context": made["context"], "rounded": len(bits), "in_int8": narrow,
        "model_bytes": (out / litert.FILE).stat().st_size,
        "token_agreement": agreed["token_agreement"], "mean_kl": agreed["mean_kl"],
    }  # fmt: skip


def _tool(work: Path, ctx: Context) -> None:
    from slmops.store import environments

    python = environments.ensure(ENVIRONMENT, ctx.progress)
    variables = {"OMP_NUM_THREADS": str(ctx.threads), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    ctx.progress.start("writing for LiteRT")
    try:
        environments.run(
            python, TOOL, [str(work / "job.json")], log=ctx.scratch / "litert.log", progress=ctx.progress, folder=work,
            variables=variables,
        )  # fmt: skip
    except ToolError as error:
        raise ConversionError(f"litert-torch failed: {error.message}", str(error.hint)) from error
    finally:
        ctx.progress.stop()


def plan(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the decoder of `litert_tool` is, from a config.json that `runtimes.litert` takes."""
    kind = config["model_type"]
    gemma = kind == "gemma3_text"
    heads, size, groups = gguf.sizes(config)
    context = min(runtimes.context(config), LONGEST)
    windows = runtimes.sliding(config) if gemma else [False] * config["num_hidden_layers"]
    layers = ["full_attention"] + (["sliding_attention"] if any(windows) else [])
    turns = {layer: gguf.turning(config, layer) for layer in layers}
    return {
        "heads": heads, "size": size, "groups": groups, "hidden": config["hidden_size"], "eps": config["rms_norm_eps"],
        "context": context, "prefill": [length for length in PREFILL if length < context] or [max(2, context // 2)],
        "tied": gguf.tied(config), "norms": kind in ("qwen3", "gemma3_text"), "packed": kind == "phi3", "gemma": gemma,
        "scale": (config.get("query_pre_attn_scalar") or 256) ** -0.5 if gemma else size**-0.5,
        "windows": windows, "window": config.get("sliding_window") or 4096,
        "cap": config.get("final_logit_softcapping") if gemma else None,
        "rotary": {layer: {"speeds": speeds.tolist(), "stretch": stretch} for layer, (speeds, stretch) in turns.items()},
    }  # fmt: skip


def _round(found: Mapping[str, gguf.Stored], params: Params, file: Path) -> tuple[dict[str, int], list[str]]:
    """Write codes and scales of the matrices that are rounded; how many bits each has, and those in int8 though int4 is asked for."""
    import numpy as np
    from safetensors.numpy import save_file

    bits, narrow, written = dict[str, int](), [], dict[str, Any]()
    for name, tensor in found.items():
        if params.precision == "fp32" or len(tensor.shape) != 2:
            continue
        table = name in ("model.embed_tokens.weight", "lm_head.weight")
        wanted = (params.embedding_precision or params.precision) if table else params.precision
        if wanted == "int4" and tensor.shape[1] % params.block_size:
            narrow.append(name.removesuffix(".weight"))
            wanted = "int8"
        bits[name] = 4 if wanted == "int4" else 8
        codes, scales = signed(tensor.read(), bits[name], params.block_size if wanted == "int4" else tensor.shape[1])
        written |= {f"{name}.codes": codes, f"{name}.scales": scales}
    save_file(written or {"none": np.zeros(1, np.float32)}, file)
    return bits, narrow


def signed(weights: NDArray[np.float32], bits: int, block_size: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Round a matrix (out, in) whose rows are a multiple of `block_size` to codes from -2^(bits-1) to 2^(bits-1) - 1 under positive scales.

    A group's scale is the one of least squared error among those that bring its largest weight to 2^(bits-1) steps, to one less, and
    to what `rounding.CANDIDATES` have; the first of equals.

    Returns:
        int8 (out, in) and float16 (out, in / block_size); a group of zeros has the scale 1.
    """
    import numpy as np

    rows, columns = weights.shape
    codes, scales = np.empty((rows, columns), np.int8), np.empty((rows, columns // block_size), np.float16)
    some = max(1, AT_ONCE // columns)
    for start in range(0, rows, some):
        part = np.asarray(weights[start : start + some], np.float32)
        found, scales[start : start + some] = _signed(part.reshape(len(part), -1, block_size), 1 << (bits - 1))
        codes[start : start + some] = found.reshape(part.shape)
    return codes, scales


def _signed(groups: NDArray[np.float32], half: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Codes and scales of groups (out, groups, block)."""
    import numpy as np

    largest = np.abs(groups).max(-1)
    codes, scales = np.zeros(groups.shape, np.int8), np.ones(largest.shape, np.float16)
    best = np.full(largest.shape, np.inf, np.float32)
    for factor in (1.0, half / (half - 1), *CANDIDATES):
        scale = (largest * np.float32(factor) / np.float32(half)).astype(np.float16)
        scale = np.where(scale > 0, scale, np.float16(1.0))
        wide = scale.astype(np.float32)[..., None]
        trial = np.clip(np.rint(groups / wide), -half, half - 1)
        error = np.square(trial * wide - groups).sum(-1)
        better = error < best
        codes, scales = np.where(better[..., None], trial.astype(np.int8), codes), np.where(better, scale, scales)
        best = np.where(better, error, best)
    return codes, scales


def _ends(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    tokenizer = PlainTokenizer(folder, "litert")
    return end_ids(folder, config, tokenizer.id_of(tokenizer.marks.get("eos_token", "")))
