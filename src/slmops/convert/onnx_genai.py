"""Method `convert.onnx_genai`: a Hugging Face model becomes a small ONNX Runtime GenAI folder, checked at once.

The runtime's own model builder makes the float32 graph; `slmops.convert.onnx_graph` rounds its weights and strips it.
The result is then compared with PyTorch on prompts of the validation split: token ids of the chat template, next-token
agreement and KL divergence along PyTorch's greedy answers. `fidelity.json` keeps the numbers. A float32 model that
does not agree is an error; rounded ones only report. The same model gives the same bytes, wherever it is converted.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from slmops.convert import onnx_gemma3
from slmops.core import runtimes, widths
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.errors import ConversionError, MissingExtraError

DECLARATION = Declaration(
    name="convert.onnx_genai",
    version="2",
    makes="model",
    takes={"model": "model", "data": "dataset", "widths?": "widths"},
    extra="convert",
    packages=("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers"),
)

BITS: dict[str, int | None] = {"fp32": None, "int8": 8, "int4": 4, "int2": 2}
ACCURACY_LEVEL = 4
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
SEARCH = {"max_length", "min_length", "do_sample", "past_present_share_buffer", "num_beams", "num_return_sequences"}


class Params(BaseParams):
    """How to convert.

    `rounding`: `search` looks for the scale with the least squared error in every group; `plain` applies the very rule
    that quantisation-aware training rounds by, so it suits models trained that way with the same block size; `ternary` takes
    layers that are -s, 0 and s as they are, refuses any other, and rounds the embedding's table and the output matrix by `search`.
    `embedding_precision`: of that table and that matrix, where they are not rounded as all else.
    `layer_precision`: of ternary layers, where not `precision`.
    `file_mb`: a model file that is larger, in MB of 10^6 bytes, is an error. The input `widths` has the bits of each matrix.
    """

    precision: Literal["fp32", "int8", "int4"] = "int4"
    block_size: Literal[16, 32, 64, 128] = 32
    rounding: Literal["search", "plain", "ternary"] = "search"
    embedding_precision: Literal["int8", "int4"] | None = None
    file_mb: Annotated[float, Field(gt=0)] | None = None
    layer_precision: Literal["int2"] | None = None
    fidelity_prompts: Annotated[int, Field(ge=1)] = 32
    min_token_agreement: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99


def supported(config: Mapping[str, Any]) -> None:
    """Check a model's config.json before any work.

    Raises:
        ConversionError: the architecture, or something about it, cannot be converted.
    """
    refusal = runtimes.onnx_genai(config)
    if refusal:
        raise ConversionError(*refusal)


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Convert `inputs["model"]` into `out` and check it on validation prompts of `inputs["data"]`."""
    import tempfile

    from slmops.engines import detect, fidelity, read_json

    source = inputs["model"]
    if detect(source) != "torch":
        raise ConversionError(f"{source} is not a Hugging Face model", "convert the trained model, not a converted one")
    config = read_json(source / "config.json")
    supported(config)
    if params.layer_precision and params.rounding != "ternary":
        raise ConversionError(
            f"{params.layer_precision} holds ternary layers alone", "train with quantization_aware: ternary"
        )
    examples = fidelity.choose(inputs["data"], params.fidelity_prompts)
    with tempfile.TemporaryDirectory(dir=ctx.scratch if ctx.scratch.is_dir() else None) as work:
        ctx.progress.start("building the graph")
        build(source, Path(work))
        ctx.progress.stop()
        chosen = read_json(inputs["widths"] / widths.FILE) if "widths" in inputs else None
        written = write(source, Path(work), out, params, chosen)
    _fits(out, params.file_mb)
    found = fidelity.check(source, out, examples, params.precision, params.min_token_agreement, ctx)
    return {
        "precision": params.precision,
        "model_bytes": model_bytes(out),
        "token_agreement": found["token_agreement"],
        "mean_kl": found["mean_kl"],
        **written,
    }


def model_bytes(folder: Path) -> int:
    """Bytes of the graph and its tensors."""
    return sum(file.stat().st_size for file in folder.glob("model.onnx*"))


def _fits(out: Path, file_mb: float | None) -> None:
    size = model_bytes(out)
    if file_mb is not None and size > file_mb * 1e6:
        raise ConversionError(
            f"the model's file has {size / 1e6:.3f} MB, more than convert.file_mb ({file_mb:g})",
            "give it a little more",
        )


def build(source: Path, work: Path, *extra: str) -> None:
    """Let the runtime's model builder write its float32 graph and settings into `work`.

    Layers that attend to a window keep the whole past all the same: a cache of the window's size refuses every request for
    which the runtime reserves fewer tokens than the window has.

    Args:
        extra: further options of the builder, such as `fuse_qkv=false`.
    """
    import gc
    import importlib.util

    if not importlib.util.find_spec("onnxruntime_genai") or not importlib.util.find_spec("onnxscript"):
        raise MissingExtraError("The ONNX Runtime GenAI model builder", "convert")
    with _quiet() as said:
        try:
            from onnxruntime_genai.models.builder import create_model, parse_extra_options

            place = (None, str(source), str(work), "fp32", "cpu", str(work / "cache"))
            wanted = ["prune_lm_head=true", "hf_token=false", "windowed_kv_cache=false", *extra]
            options = parse_extra_options(*place, wanted)
            config = options["hf_details"]["hf_config"]
            if config.architectures[0] == onnx_gemma3.ARCHITECTURE:
                onnx_gemma3.flatten(config)
            create_model(*place, **options)
        except ImportError as error:
            raise MissingExtraError(f"The model builder ({error.name})", "convert") from error
        except Exception as error:
            tail = said.getvalue().strip().splitlines()[-1:] or [""]
            raise ConversionError(
                f"the model builder failed: {type(error).__name__}: {error}", f"its last words: {tail[0]}"
            ) from error
        finally:
            gc.collect()  # its model and graph hold each other, and all weights with them


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Catch what the builder prints and logs; switch off its progress bars."""
    import logging

    level = logging.root.manager.disable
    bars = os.environ.get("TQDM_DISABLE")
    said = io.StringIO()
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield said
    finally:
        logging.disable(level)
        if bars is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = bars


def write(
    source: Path, work: Path, out: Path, params: Params, chosen: Mapping[str, int] | None = None,
    change: Callable[[Any], None] | None = None,
) -> Facts:  # fmt: skip
    """Rewrite the builder's graph into `out`, with its settings and the tokenizer of the source.

    Args:
        chosen: bits by unit; see `core.widths`.
        change: done to the builder's graph (an `onnx.ModelProto`) while its nodes still have names.
    """
    import shutil

    import onnx

    from slmops.convert.onnx_graph import rewrite

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model = onnx.load(work / "model.onnx")
    if config["architectures"][0] == onnx_gemma3.ARCHITECTURE:
        onnx_gemma3.correct(model, source)
    if change:
        change(model)
    report = rewrite(
        model,
        bits=BITS[params.layer_precision or params.precision],
        block_size=params.block_size,
        accuracy_level=ACCURACY_LEVEL,
        search=params.rounding != "plain",
        table_bits=BITS[params.embedding_precision or params.precision],
        widths=chosen,
        exact=params.rounding == "ternary",
    )
    onnx.save_model(
        model, out / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=1024
    )
    (out / "model.onnx.data").chmod(0o644)
    settings = json.loads((work / "genai_config.json").read_text(encoding="utf-8"))
    if config.get("bos_token_id") is None:
        settings["model"].pop("bos_token_id", None)
    settings["model"]["context_length"] = config["max_position_embeddings"]
    settings["search"] = {k: v for k, v in settings["search"].items() if k in SEARCH}
    settings["search"].update(max_length=config["max_position_embeddings"], do_sample=False)
    settings["model"]["decoder"].setdefault("session_options", {})["enable_mem_pattern"] = (
        False  # one a length of prompt
    )
    (out / "genai_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    return {"rounded": len(report.rounded), "kept_fp32": report.kept, "rotary_computed": report.rotary_computed}
