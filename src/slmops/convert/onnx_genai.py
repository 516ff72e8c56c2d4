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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from slmops.convert import onnx_gemma3
from slmops.core import runtimes
from slmops.core.engine import Engine, Sampling
from slmops.core.example import Example
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.errors import ConversionError, MissingExtraError
from slmops.store.rows import read_examples

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DECLARATION = Declaration(
    name="convert.onnx_genai",
    version="2",
    makes="model",
    takes={"model": "model", "data": "dataset"},
    extra="convert",
    packages=("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers"),
)

BITS: dict[str, int | None] = {"fp32": None, "int8": 8, "int4": 4}
ACCURACY_LEVEL = 4
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
SEARCH = {"max_length", "min_length", "do_sample", "past_present_share_buffer", "num_beams", "num_return_sequences"}
CONTINUATION = 32


class Params(BaseParams):
    """How to convert.

    `rounding`: `search` looks for the scale with the least squared error in every group; `plain` applies the very rule
    that quantisation-aware training rounds by, so it suits models trained that way with the same block size.
    """

    precision: Literal["fp32", "int8", "int4"] = "int4"
    block_size: Literal[16, 32, 64, 128] = 32
    rounding: Literal["search", "plain"] = "search"
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

    from slmops.engines import detect, open_engine, read_json

    source = inputs["model"]
    if detect(source) != "torch":
        raise ConversionError(f"{source} is not a Hugging Face model", "convert the trained model, not a converted one")
    config = read_json(source / "config.json")
    supported(config)
    examples = choose(inputs["data"], params.fidelity_prompts)
    with tempfile.TemporaryDirectory(dir=ctx.scratch if ctx.scratch.is_dir() else None) as work:
        ctx.progress.start("building the graph")
        build(source, Path(work))
        ctx.progress.stop()
        written = write(source, Path(work), out, params)
    reference = open_engine(source, threads=1, kind="torch")
    converted = open_engine(out, threads=1, kind="onnx_genai")
    ctx.progress.start("checking against PyTorch", len(examples), "prompts")
    fidelity = compare(reference, converted, examples, on_done=ctx.progress.advance)
    ctx.progress.stop()
    reference.close()
    converted.close()
    fidelity["precision"] = params.precision
    (out / "fidelity.json").write_text(json.dumps(fidelity, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    judge(fidelity, params)
    bytes_ = sum(f.stat().st_size for f in out.glob("model.onnx*"))
    return {
        "precision": params.precision,
        "model_bytes": bytes_,
        "token_agreement": fidelity["token_agreement"],
        "mean_kl": fidelity["mean_kl"],
        **written,
    }


def choose(data: Path, count: int) -> list[Example]:
    """`count` validation prompts, those with the smallest ids; never test prompts.

    Raises:
        ConversionError: there is no validation prompt.
    """
    examples = {example.id: example for example in read_examples(data / "validation.jsonl")}
    if not examples:
        raise ConversionError(
            "there are no validation prompts to check the conversion on", "set data.splits.validation"
        )
    return [examples[key] for key in sorted(examples)[:count]]


def build(source: Path, work: Path, *extra: str) -> None:
    """Let the runtime's model builder write its float32 graph and settings into `work`.

    Layers that attend to a window keep the whole past all the same: a cache of the window's size refuses every request for
    which the runtime reserves fewer tokens than the window has.

    Args:
        extra: further options of the builder, such as `fuse_qkv=false`.
    """
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
    source: Path, work: Path, out: Path, params: Params, change: Callable[[Any], None] | None = None
) -> Facts:  # fmt: skip
    """Rewrite the builder's graph into `out`, with its settings and the tokenizer of the source.

    Args:
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
        bits=BITS[params.precision],
        block_size=params.block_size,
        accuracy_level=ACCURACY_LEVEL,
        search=params.rounding == "search",
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


def compare(reference: Engine, converted: Engine, examples: Sequence[Example], on_done: Any = None) -> dict[str, Any]:
    """Agreement of two engines along the greedy answers of the first.

    Returns:
        `prompts`, `positions`, `token_agreement` (share of positions with the same most likely token), `mean_kl`
        (nats), `max_logit_difference`, `template_equal` (share of prompts with equal token ids), `skipped` (prompts
        that leave no room in the context), and for the first that differs `first_divergence` or `first_template_difference`.
    """
    import numpy as np

    positions = agreed = templates = skipped = 0
    divergence = largest = 0.0
    first: dict[str, Any] | None = None
    first_template: dict[str, Any] | None = None
    prompts = [reference.encode(example.prompt_messages()) for example in examples]
    fitting = [ids for ids in prompts if len(ids) < reference.context_length]
    answers = iter(reference.generate(fitting, Sampling(max_new_tokens=CONTINUATION)))
    for example, ids in zip(examples, prompts, strict=True):
        other = converted.encode(example.prompt_messages())
        templates += ids == other
        if ids != other and first_template is None:
            first_template = {"id": example.id, "reference": ids, "converted": other}
        if len(ids) >= reference.context_length:
            skipped += 1
        else:
            whole = [*ids, *next(answers).tokens[:-1]]
            start = len(ids) - 1
            a, b = _rows(reference, whole, start), _rows(converted, whole, start)
            wanted, got = a.argmax(-1), b.argmax(-1)
            positions += len(a)
            agreed += int((wanted == got).sum())
            p, q = _log_softmax(a), _log_softmax(b)
            divergence += float((np.exp(p) * (p - q)).sum())
            largest = max(largest, float(np.abs(a - b).max()))
            if first is None and (wanted != got).any():
                step = int((wanted != got).argmax())
                first = {
                    "id": example.id,
                    "step": step,
                    "reference": reference.decode([int(wanted[step])]),
                    "converted": reference.decode([int(got[step])]),
                }
        if on_done:
            on_done(1)
    return {
        "prompts": len(examples),
        "skipped": skipped,
        "positions": positions,
        "token_agreement": agreed / positions if positions else None,
        "mean_kl": round(max(divergence / positions, 0.0), 9) if positions else None,
        "max_logit_difference": round(largest, 6),
        "template_equal": templates / len(examples),
        "first_divergence": first,
        "first_template_difference": first_template,
    }


def judge(fidelity: Mapping[str, Any], params: Params) -> None:
    """Refuse a conversion that is wrong, as opposed to rounded.

    Raises:
        ConversionError: token ids differ, no prompt fits, or a float32 model agrees less than it must.
    """
    if fidelity["template_equal"] < 1.0:
        where = fidelity["first_template_difference"]
        raise ConversionError(
            f"the runtime's tokenizer or chat template gives other token ids than transformers for prompt {where['id']}: "
            f"{where['converted'][:12]} instead of {where['reference'][:12]}",
            "the runtime knows no normaliser and only plain Jinja templates; remove the normaliser from tokenizer.json",
        )
    if not fidelity["positions"]:
        raise ConversionError("every validation prompt is longer than the context", "train with a longer context")
    if params.precision == "fp32" and fidelity["token_agreement"] < params.min_token_agreement:
        where = fidelity["first_divergence"]
        raise ConversionError(
            f"the converted model agrees with PyTorch on {fidelity['token_agreement']:.2%} of next tokens, less than "
            f"{params.min_token_agreement:.2%}; first at prompt {where['id']}, token {where['step']}: "
            f"{where['converted']!r} instead of {where['reference']!r}",
            "the architecture may have a feature that the builder does not know; see fidelity.json",
        )


def _rows(engine: Any, ids: list[int], start: int) -> NDArray[np.float64]:
    """Logits from position `start` on, float64 (len(ids) - start, vocabulary)."""
    import numpy as np

    rows: NDArray[np.float64] = np.asarray(engine.logits(ids, start), np.float64)
    return rows


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    shifted = logits - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
