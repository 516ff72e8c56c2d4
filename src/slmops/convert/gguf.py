"""Method `convert.gguf`: a Hugging Face model becomes one GGUF file that llama.cpp runs by itself, tokenizer and all.

Architectures: llama, qwen3, phi3, gemma3_text. Matrices are fp32, fp16, bf16 or q8_0 (blocks of 32 weights with one
scale; a matrix whose rows are no multiple of 32 stays fp16), or of a type that llama.cpp's own library makes from fp32
(`gguf_quantize`), weighed by what training examples make of them where there are `files`; norms and biases are fp32. The ternary types
tq1_0 and tq2_0 are for models whose layers are ternary already (`train.quantization_aware`), and hold them bit for bit; their
embedding and output matrix are of the types that llama.cpp chooses. With `data` the
result is run in llama.cpp and compared with torch (`fidelity`). Whatever llama.cpp would compute
otherwise than the model does is refused before anything is written, with exceptions that `differs` in the facts names:
texts that llama.cpp cuts into other tokens, tokens at which it alone ends an answer, positions beyond the first context
of a model with long rotary factors, and a phi3 with an attention window, whose context is cut to that window.

What is laid out anew: llama's query and key rows (`gguf_names`); gemma3's norms, which Hugging Face keeps as w where w + 1
multiplies; gemma3's attention scale where it is not that of the head size, which goes into the norm of the queries.
Embeddings are written once if the output shares them.

Law: in fp32, llama.cpp's logits are those of torch, up to rounding. The same folder gives the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from slmops.convert import gguf_names, gguf_quantize, gguf_vocabulary
from slmops.convert.importance import mean_squares
from slmops.convert.rounding import ternary
from slmops.core import runtimes
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive
from slmops.engines import detect, fidelity, read_json
from slmops.errors import ConversionError, ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

DECLARATION = Declaration(
    name="convert.gguf",
    version="2",
    makes="model",
    takes={"model": "model", "data?": "dataset", "synthetic?": "dataset", "augmented?": "dataset"},
    extra="llamacpp",
    packages=("gguf", "numpy", "llama-cpp-python", "torch", "transformers"),
)

FILE = "model.gguf"
Precision = Literal["fp32", "fp16", "bf16", "q8_0"]
Quantized = Literal["q2_k", "q3_k_m", "q4_0", "q4_k_m", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs"]
Ternary = Literal["tq1_0", "tq2_0"]
TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
FILE_TYPES = {"fp32": "ALL_F32", "fp16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
BLOCK = 32
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
NO_MERGE = "▁ ▁"
"""Stands for no merges, since a list in GGUF is never empty: no text becomes bytes that are written with this letter."""
LARGE_GEMMA = 62
"""Layers of the one Gemma 3 whose attention llama.cpp scales by hidden / heads, not by the size of a head."""


class Params(BaseParams):
    """`precision` of the matrices; `files` of examples, as `input/file`, of which `examples` say what counts in a quantised type."""

    precision: Precision | Quantized | Ternary = "fp16"
    files: tuple[str, ...] = ()
    examples: Positive = 256
    fidelity_prompts: Positive = 32
    min_token_agreement: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file. `shape` is that of Hugging Face, (outputs, inputs) for a matrix."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self) -> Array:
        """Its values, float32."""
        import numpy as np

        raw = np.memmap(self.file, np.dtype(DTYPES[self.dtype]), "r", self.start, self.shape)
        if self.dtype == "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(raw, np.float32)


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write `model.gguf` from the folder `inputs["model"]`, and check it on validation prompts of `inputs["data"]` if that is given.

    Raises:
        ConversionError: the architecture, the tokenizer or a tensor cannot be written, or llama.cpp does not agree with torch.
        MissingExtraError: `gguf` is not installed, or llama.cpp where it is needed.
    """
    source = inputs["model"]
    examples = fidelity.choose(inputs["data"], params.fidelity_prompts) if "data" in inputs else []
    if params.precision in TYPES:
        facts = export(source, out, params.precision, ctx)  # type: ignore[arg-type]
    else:
        facts = _quantized(params, inputs, out, ctx)
    if examples:
        found = fidelity.check(source, out, examples, params.precision, params.min_token_agreement, ctx)
        facts |= {"token_agreement": found["token_agreement"], "mean_kl": found["mean_kl"]}
    return facts


def _quantized(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write `model.gguf` in a type of llama.cpp's own library, from a float32 file that does not stay."""
    import tempfile

    source = inputs["model"]
    weights: dict[str, Any] = {}
    if params.precision.startswith("tq"):
        require_ternary(source)
    with tempfile.TemporaryDirectory(dir=ctx.scratch if ctx.scratch.is_dir() else None) as work:
        facts = export(source, Path(work), "fp32", ctx)
        if params.files:
            config = read_json(source / "config.json")
            name = gguf_names.namer(config)
            head = "token_embd" if tied(config) else "output"
            found = mean_squares(source, inputs, params.files, params.examples, ctx.threads)
            weights = {
                f"{head if layer == 'lm_head' else name(layer)}.weight": values for layer, values in found.items()
            }
        gguf_quantize.quantize(Path(work) / FILE, out / FILE, params.precision, ctx.threads, weights)
    made = gguf_quantize.types(out / FILE)
    other = {kind: count for kind, count in made.items() if "_k" in params.precision and "_k" not in kind}
    if other:
        total = sum(made.values())
        ctx.progress.log(
            f"{sum(other.values())} of {total} matrices are in {' and '.join(sorted(other))}: their rows are no multiple of 256 weights, "
            f"which {params.precision} needs"
        )
    return facts | {"precision": params.precision, "model_bytes": (out / FILE).stat().st_size, "types": made}


def require_ternary(source: Path) -> None:
    """Refuse a model whose layers a ternary type does not hold as they are.

    Raises:
        ConversionError: rows are no multiple of 256 weights, or hold other values than -s, 0 and s.
    """
    config = read_json(source / "config.json")
    gguf_names.supported(config)
    refusal = runtimes.ternary(runtimes.ternary_widths(config))
    if refusal:
        raise ConversionError(*refusal)
    for name, tensor in stored(source):
        inner = len(tensor.shape) == 2 and ".layers." in name
        if inner and ternary(tensor.read(), 2, runtimes.TERNARY_GROUP) is None:
            raise ConversionError(
                f"{name} is not ternary, and rounded to three values the model would be lost",
                "train it with quantization_aware: ternary, or take q4_0",
            )


def export(source: Path, out: Path, precision: Precision, ctx: Context) -> Facts:
    """Write `model.gguf` into `out`; see `run`."""
    gguf_names.library()
    if detect(source) != "torch":
        raise ConversionError(f"{source} is not a Hugging Face model", "convert the trained model, not a converted one")
    config = read_json(source / "config.json")
    gguf_names.supported(config)
    vocabulary = gguf_vocabulary.read(source, config["vocab_size"])
    tensors = place(config, dict(stored(source)))
    length, differs = context(config)
    write(source, config, vocabulary, tensors, length, out / FILE, precision, ctx)
    differs = [*vocabulary.differs, *differs]
    for text in differs:
        ctx.progress.log(f"llama.cpp differs from torch in {text}")
    return {
        "precision": precision, "architecture": gguf_names.architecture(config), "tensors": len(tensors),
        "model_bytes": (out / FILE).stat().st_size, "context": length, "pre_tokenizer": vocabulary.pre,
        "differs": differs,
    }  # fmt: skip


def stored(folder: Path) -> Iterator[tuple[str, Stored]]:
    """Names and places of all tensors in the safetensors files of a folder.

    Raises:
        ModelError: a file is damaged.
        ConversionError: a tensor is not of a floating type.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            raise ModelError(f"{path} is no safetensors file", "the folder is damaged; make it again") from error
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise ConversionError(f"{name} is of the type {entry['dtype']}", "give the model in full precision")
            yield name, Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])


def place(config: Mapping[str, Any], found: Mapping[str, Stored]) -> dict[str, tuple[str, Stored]]:
    """Name in GGUF to name and place in Hugging Face, all that llama.cpp expects and no other.

    Raises:
        ConversionError: a tensor has no place, one is missing, or one has another shape than config.json says.
    """
    name_of = gguf_names.namer(config)
    placed = {}
    for name, tensor in checked(config, found, "GGUF").items():
        layer, _, part = name.rpartition(".")
        new = name_of(layer)
        if new is None:
            raise _no_place("GGUF", name)
        placed[f"{new}.{part}"] = (name, tensor)
    return placed


def checked(config: Mapping[str, Any], found: Mapping[str, Stored], where: str) -> dict[str, Stored]:
    """The tensors that are written, by name in rising order: all that the architecture has and no other.

    Args:
        where: what they are written for, for messages.

    Raises:
        ConversionError: a tensor has no place, one is missing, or one has another shape than config.json says.
    """
    expected, shared = shapes(config), tied(config)
    kept = {name: found[name] for name in sorted(found) if not (shared and name == "lm_head.weight")}
    for name, tensor in kept.items():
        if name not in expected:
            raise _no_place(where, name)
        if tensor.shape != expected[name]:
            raise ConversionError(
                f"{name} has the shape {tensor.shape}, not {expected[name]}", "config.json is of another model"
            )
    optional = {name for name in expected if name.endswith(".bias")} | ({"lm_head.weight"} if shared else set())
    missing = sorted(set(expected) - set(kept) - optional)
    if missing:
        raise ConversionError(f"the model has no tensor {missing[0]}", "fetch it whole")
    return kept


def _no_place(where: str, name: str) -> ConversionError:
    return ConversionError(f"{where} has no place for the tensor {name}", "give a model without additions of its own")


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the token embedding is the output matrix too."""
    return bool(config.get("tie_word_embeddings", config["model_type"] == "gemma3_text"))


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that a model of this architecture has, with their shapes; biases are llama's only, and may be missing."""
    kind, hidden, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads, size, groups = sizes(config)
    head, keys = (config["vocab_size"], hidden), groups * size
    layer: dict[str, tuple[int, ...]] = {"self_attn.o_proj": (hidden, heads * size), "mlp.down_proj": (hidden, inner)}
    if kind == "phi3":
        layer |= {"self_attn.qkv_proj": (heads * size + 2 * keys, hidden), "mlp.gate_up_proj": (2 * inner, hidden)}
    else:
        layer |= {
            f"self_attn.{part}_proj": (width * size, hidden)
            for part, width in zip("qkv", (heads, groups, groups), strict=True)
        }
        layer |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    biases = {f"{name}.bias": shape[:1] for name, shape in layer.items()} if kind == "llama" else {}
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if kind == "gemma3_text" else []
    layer |= dict.fromkeys(norms, (hidden,))
    if kind in ("qwen3", "gemma3_text"):
        layer |= {"self_attn.q_norm": (size,), "self_attn.k_norm": (size,)}
    layer = {f"{name}.weight": shape for name, shape in layer.items()} | biases
    whole = {"model.embed_tokens.weight": head, "model.norm.weight": (hidden,), "lm_head.weight": head}
    for number in range(config["num_hidden_layers"]):
        whole |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return whole


def sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Attention heads, the size of one, and groups of keys and values."""
    heads = config["num_attention_heads"]
    return heads, config.get("head_dim") or config["hidden_size"] // heads, config.get("num_key_value_heads") or heads


def context(config: Mapping[str, Any]) -> tuple[int, list[str]]:
    """How many tokens llama.cpp may hold, and where it computes otherwise than torch, in words."""
    length, window, differs = config["max_position_embeddings"], config.get("sliding_window"), []
    if config["model_type"] == "phi3":
        rotary = runtimes.rotary(config)
        if rotary["rope_type"] == "longrope" and runtimes.first_context(config) < length:
            differs.append(f"positions, where room for more than {runtimes.first_context(config)} tokens is asked for")
        if window and window < length:
            differs.append(f"the context, cut to the attention window of {window}")
            length = window
    return length, differs


def write(
    source: Path, config: Mapping[str, Any], vocabulary: gguf_vocabulary.Vocabulary,
    tensors: Mapping[str, tuple[str, Stored]], length: int, file: Path, precision: Precision, ctx: Context,
) -> None:  # fmt: skip
    """Write the file, one tensor in memory at a time."""
    import numpy as np

    gguf = gguf_names.library()
    writer = gguf.GGUFWriter(file, gguf_names.architecture(config))
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[precision]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    hyperparameters(writer, config, length)
    tokens(writer, vocabulary)
    extra = factors(config)
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    kinds = {name: kind(tensor, precision) for name, (_, tensor) in tensors.items()}
    for name, (_, tensor) in tensors.items():
        of = gguf.GGMLQuantizationType[kinds[name]]
        block, size = gguf.GGML_QUANT_SIZES[of]
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), math.prod(tensor.shape) // block * size, of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in extra.values():
        writer.write_tensor_data(values)
    ctx.progress.start("writing GGUF", len(tensors), "tensors")
    for name, (old, tensor) in tensors.items():
        values = np.ascontiguousarray(arrange(tensor.read(), old, config))
        writer.write_tensor_data(gguf.quants.quantize(values, gguf.GGMLQuantizationType[kinds[name]]))
        ctx.progress.advance()
    ctx.progress.stop()
    writer.close()


def kind(tensor: Stored, precision: Precision) -> str:
    """GGUF's type of a tensor."""
    if len(tensor.shape) == 1:
        return "F32"
    return "F16" if precision == "q8_0" and tensor.shape[-1] % BLOCK else TYPES[precision]


def arrange(values: Array, name: str, config: Mapping[str, Any]) -> Array:
    """A tensor's values as llama.cpp multiplies by them; see the module."""
    layer = name.rpartition(".")[0]
    if config["model_type"] != "gemma3_text" or not layer.endswith("norm"):
        return gguf_names.rows(values, layer, config)
    values = values + 1
    if layer.endswith("q_norm"):
        heads, size, _ = sizes(config)
        theirs = config["hidden_size"] // heads if config["num_hidden_layers"] == LARGE_GEMMA else size
        values = values * math.sqrt(theirs / config.get("query_pre_attn_scalar", 256))
    return values


def hyperparameters(writer: Any, config: Mapping[str, Any], length: int) -> None:
    """What the graph is made from."""
    gguf = gguf_names.library()
    heads, size, groups = sizes(config)
    rotary = runtimes.rotary(config)
    writer.add_context_length(length)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rotary["rope_theta"])
    writer.add_rope_dimension_count(int(size * rotary["partial_rotary_factor"]))
    if rotary["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotary["factor"])
    if config["model_type"] == "phi3":
        first = runtimes.first_context(config)
        writer.add_rope_scaling_orig_ctx_len(first)
        if rotary["rope_type"] == "longrope":
            writer.add_rope_scaling_attn_factors(runtimes.stretch(config))
    windows = runtimes.sliding(config) if config["model_type"] == "gemma3_text" else []
    if any(windows):
        writer.add_sliding_window(config.get("sliding_window") or 4096)
        writer.add_sliding_window_pattern(windows)
        writer.add_rope_freq_base_swa(runtimes.rotary(config, "sliding_attention")["rope_theta"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def factors(config: Mapping[str, Any]) -> dict[str, Array]:
    """What divides the rotary frequencies: Llama 3's one set, or phi3's for short and for long contexts."""
    import numpy as np

    rotary = runtimes.rotary(config)
    if rotary["rope_type"] == "longrope":
        return {f"rope_factors_{k}.weight": np.array(rotary[f"{k}_factor"], np.float32) for k in ("long", "short")}
    if rotary["rope_type"] != "llama3":
        return {}
    size = sizes(config)[1]
    first, factor = rotary["original_max_position_embeddings"], rotary["factor"]
    low, high = rotary["low_freq_factor"], rotary["high_freq_factor"]
    turns = first * rotary["rope_theta"] ** (-np.arange(0, size, 2) / size) / (2 * math.pi)  # in the first context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


def turning(config: Mapping[str, Any], layers: str) -> tuple[NDArray[np.float64], float]:
    """Rotary speeds of a type of layer, one for each pair of numbers of a head that is turned, and what multiplies sines and cosines. Of
    a phi3 those of its first context."""
    import numpy as np

    found = runtimes.rotary(config, layers)
    rotated = int(sizes(config)[1] * found["partial_rotary_factor"])
    speeds = found["rope_theta"] ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    if found["rope_type"] == "linear":
        speeds = speeds / found["factor"]
    for name, divisors in factors(config).items():
        if name != "rope_factors_long.weight":
            speeds = speeds / divisors
    return speeds, runtimes.stretch(config) if found["rope_type"] == "longrope" else 1.0


def tokens(writer: Any, vocabulary: gguf_vocabulary.Vocabulary) -> None:
    """The tokenizer's part of the file."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    writer.add_token_merges(list(vocabulary.merges or (NO_MERGE,)))
    for name, id in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(id)
    writer.add_add_bos_token(vocabulary.starts)
    writer.add_add_eos_token(False)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)
