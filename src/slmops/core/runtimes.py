"""What a runtime can take, told from config.json alone: so that a model is refused before anything is spent on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Named = Literal["torch", "onnx_genai", "llama_cpp", "mlx", "openvino", "litert", "executorch"]
"""The runtimes that models run in here."""
ARCHITECTURES = (
    "Gemma3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
)  # fmt: skip
HEAD_MULTIPLE = 16
TERNARY_GROUP = 256
"""Weights of a row that share a scale in llama.cpp's ternary types, which rows of another length do not fit into."""
LLAMA_CPP = {"gemma3_text": "GEMMA3", "llama": "LLAMA", "phi3": "PHI3", "qwen3": "QWEN3"}
"""model_type of Hugging Face to llama.cpp's architecture, for those that slmops writes as GGUF."""
EXECUTORCH_GROUPS = (32, 64, 128)
"""Weights that can share a scale in XNNPACK, of the sizes that `convert.block_size` has."""
LITERT_GROUPS = (32, 64, 128)
"""Weights that can share a scale in LiteRT, of the sizes that `convert.block_size` has."""
MLX_GROUPS = (32, 64, 128)
"""Weights that share a scale in MLX."""
ROTARY = {
    "gemma3_text": ("default", "linear"), "llama": ("default", "linear", "llama3"), "phi3": ("default", "longrope"),
    "qwen3": ("default", "linear"),
}  # fmt: skip
"""Kinds of rotary positions that are written as GGUF."""


class Refusal(NamedTuple):
    """Why not, and what to do instead."""

    message: str
    hint: str


def head_size(hidden: int, heads: int, size: int | None = None) -> Refusal | None:
    """Whether the runtime's attention (GroupQueryAttention on CPU) computes heads of `size`, default `hidden / heads`."""
    size = size or hidden // heads
    if size % HEAD_MULTIPLE == 0:
        return None
    fits = [n for n in range(1, hidden + 1) if hidden % n == 0 and (hidden // n) % HEAD_MULTIPLE == 0]
    near = sorted(sorted(fits, key=lambda n: abs(n - heads))[:2])
    hint = f"with hidden {hidden}, give heads {' or '.join(map(str, near))}" if near else "give hidden a multiple of 16"
    return Refusal(
        f"heads of size {size} do not run in ONNX Runtime: it takes multiples of {HEAD_MULTIPLE} (hidden / heads)", hint
    )


def onnx_genai(config: Mapping[str, Any]) -> Refusal | None:
    """Whether a model with this config.json can be converted for ONNX Runtime GenAI."""
    names = config.get("architectures") or ["(none)"]
    if names[0] not in ARCHITECTURES:
        known = ", ".join(a.removesuffix("ForCausalLM") for a in ARCHITECTURES)
        return Refusal(f"architecture {names[0]} cannot be converted to ONNX", f"these can: {known}")
    if config.get("quantization_config"):
        return Refusal("the model is quantised already", "give the model in full precision")
    if not config.get("max_position_embeddings"):
        return Refusal("config.json has no max_position_embeddings", "say how many tokens the context holds")
    if names[0] == "Gemma3ForCausalLM" and (refusal := _gemma3(config)):
        return refusal
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return Refusal("config.json has no hidden_size or num_attention_heads", "fetch the model again")
    found = head_size(hidden, heads, config.get("head_dim"))
    if found:
        return Refusal(found.message, "give a model with other heads")
    size, shared = config.get("head_dim") or hidden // heads, config.get("num_key_value_heads") or heads
    widths = [hidden, heads * size, shared * size, config.get("intermediate_size") or 0]
    if names[0] == "Phi3ForCausalLM":
        widths += [(heads + 2 * shared) * size, 2 * widths[-1]]
    return as_many_tokens(config.get("vocab_size") or 0, widths)


def as_many_tokens(vocabulary: int, widths: Sequence[int]) -> Refusal | None:
    """Whether a layer with these numbers of outputs could be taken for the output matrix: the builder knows that one by its size."""
    if not vocabulary or vocabulary not in widths:
        return None
    said = f"a layer has as many outputs as there are tokens ({vocabulary}), so ONNX Runtime's builder takes it for the output matrix"
    return Refusal(said, "give the vocabulary another size")


def _gemma3(config: Mapping[str, Any]) -> Refusal | None:
    """What the graph of a Gemma 3 has no place for. Rotary settings: one group per type of layer, or the older flat form."""
    if config.get("use_bidirectional_attention"):
        return Refusal("attention in both directions cannot be converted to ONNX", "give a model that generates")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    groups = [group for group in rope.values() if isinstance(group, Mapping)] or [rope]
    for kind in sorted(str(group.get("rope_type") or group.get("type") or "default") for group in groups):
        if kind not in ("default", "linear"):
            return Refusal(f"rotary positions of type {kind} cannot be converted to ONNX", "these can: default, linear")
    return None


def ternary(widths: Mapping[str, int]) -> Refusal | None:
    """Whether layers with inputs of these widths, by what a user calls them, can be trained ternary.

    llama.cpp would take a larger type for others without saying so.
    """
    odd = {name: width for name, width in widths.items() if width % TERNARY_GROUP}
    if not odd:
        return None
    near = {
        name: sorted({max(1, width // TERNARY_GROUP) * TERNARY_GROUP, -(-width // TERNARY_GROUP) * TERNARY_GROUP})
        for name, width in odd.items()
    }
    said = " and ".join(f"{name} {width}" for name, width in odd.items())
    hint = ", ".join(f"{name} {' or '.join(map(str, fits))}" for name, fits in near.items())
    return Refusal(f"ternary layers need inputs of a multiple of {TERNARY_GROUP}, not {said}", f"these fit: {hint}")


def ternary_widths(config: Mapping[str, Any]) -> dict[str, int]:
    """The widths that `ternary` looks at, as far as a config.json says them."""
    inner = config.get("text_config") or config
    found = {name: int(inner[name]) for name in ("hidden_size", "intermediate_size") if inner.get(name)}
    if inner.get("num_attention_heads") and inner.get("head_dim"):
        found["num_attention_heads × head_dim"] = int(inner["num_attention_heads"]) * int(inner["head_dim"])
    return found


def rotary(config: Mapping[str, Any], layers: str = "full_attention") -> dict[str, Any]:
    """Rotary settings of one type of layer, from either form that config.json has had.

    Returns:
        `rope_type`, `rope_theta`, `partial_rotary_factor` and what the type needs besides.
    """
    gemma = config.get("model_type") == "gemma3_text"
    local = gemma and layers == "sliding_attention"
    theta = 1e6 if gemma and not local else 1e4
    found = config.get("rope_parameters")
    if found:
        found = found[layers] if isinstance(found.get(layers), Mapping) else found
    elif local:
        found = {"rope_theta": config.get("rope_local_base_freq", theta)}
    else:
        found = {"rope_theta": config.get("rope_theta", theta), **(config.get("rope_scaling") or {})}
    kind = found.get("rope_type") or found.get("type") or "default"
    part = config.get("partial_rotary_factor") or 1.0
    return {
        "rope_theta": theta,
        "partial_rotary_factor": part,
        **found,
        "rope_type": "longrope" if kind == "su" else kind,
    }


def sliding(config: Mapping[str, Any]) -> list[bool]:
    """Of each layer, whether it attends to a window alone. Gemma's default is five such layers, then one that sees all."""
    count = config["num_hidden_layers"]
    if "layer_types" in config:
        return [kind == "sliding_attention" for kind in config["layer_types"]]
    if config.get("model_type") != "gemma3_text":
        return [bool(config.get("use_sliding_window") and config.get("sliding_window"))] * count
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    return [(layer + 1) % every != 0 for layer in range(count)]


def llama_cpp(config: Mapping[str, Any]) -> Refusal | None:
    """Whether a model with this config.json can be written as GGUF so that llama.cpp computes the same."""
    return _decoder(config, "as GGUF", "llama.cpp")


def mlx(config: Mapping[str, Any]) -> Refusal | None:
    """Whether a model with this config.json can be written so that mlx-lm computes the same."""
    refusal = _decoder(config, "for MLX", "mlx-lm")
    if refusal:
        return refusal
    kind = config["model_type"]
    if config.get("final_logit_softcapping"):
        return Refusal("final_logit_softcapping is set, which mlx-lm does not compute", "give another model")
    if kind == "qwen3" and config.get("attention_bias"):
        return Refusal("attention has biases, which mlx-lm does not compute in a qwen3", "give another model")
    if kind == "gemma3_text" and window_pattern(config) is None:
        said = "layers that see all do not come at one distance, or there is none, which mlx-lm does not compute"
        return Refusal(said, "give another model")
    if rotary(config)["rope_type"] == "longrope":
        usual = dict(config) | {
            "rope_parameters": None,
            "rope_scaling": rotary(config) | {"factor": None, "attention_factor": None},
        }
        if not math.isclose(stretch(config), stretch(usual), rel_tol=1e-6):
            return Refusal("rotary positions with an attention_factor cannot be written for MLX", "give another model")
    return None


def mlx_groups(widths: Sequence[int], size: int) -> Refusal | None:
    """Whether MLX can round matrices, some of whose rows have these widths, in groups of this size."""
    if size not in MLX_GROUPS:
        these = ", ".join(map(str, MLX_GROUPS))
        return Refusal(f"MLX does not round in groups of {size} weights", f"these can: {these}")
    if any(width % size == 0 for width in widths):
        return None
    fits = [group for group in MLX_GROUPS if any(width % group == 0 for width in widths)]
    hint = (
        f"use groups of {fits[0]}" if fits else f"take fp16, or a model whose widths are multiples of {MLX_GROUPS[0]}"
    )
    return Refusal(f"no matrix has rows of a multiple of {size} weights, which MLX rounds together", hint)


def openvino(config: Mapping[str, Any]) -> Refusal | None:
    """Whether a model with this config.json can be written as a graph for OpenVINO that computes the same."""
    return _decoder(config, "for OpenVINO", "the graph for OpenVINO")


def litert(config: Mapping[str, Any]) -> Refusal | None:
    """Whether a model with this config.json can be written as a graph for LiteRT that computes the same."""
    return _decoder(config, "for LiteRT", "the graph for LiteRT")


def executorch(config: Mapping[str, Any]) -> Refusal | None:
    """Whether a model with this config.json can be written as a program for ExecuTorch that computes the same."""
    return _decoder(config, "for ExecuTorch", "the program for ExecuTorch")


def safetensors(config: Mapping[str, Any]) -> Refusal | None:
    """Whether a model with this config.json can be written in another type of weights."""
    if config.get("quantization_config"):
        return Refusal("the model is quantised already", "give the model in full precision")
    return None


def _decoder(config: Mapping[str, Any], how: str, runtime: str) -> Refusal | None:
    """What holds for every runtime whose graphs of these architectures are those of llama.cpp."""
    kind = config.get("model_type")
    if kind not in LLAMA_CPP:
        return Refusal(f"models of the type {kind} cannot be written {how}", f"these can: {', '.join(LLAMA_CPP)}")
    if config.get("quantization_config"):
        return Refusal("the model is quantised already", "give the model in full precision")
    numbers = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps",
        "max_position_embeddings",
    )  # fmt: skip
    missing = [name for name in numbers if not config.get(name)]
    if missing:
        return Refusal(f"config.json has no {missing[0]}", "fetch the model again")
    own = _own(config)
    if own is not None:
        return Refusal(f"{own}, which {runtime} does not compute", "give another model")
    groups = [rotary(config)] + ([rotary(config, "sliding_attention")] if kind == "gemma3_text" else [])
    for group, known in zip(groups, (ROTARY[kind], ("default",)), strict=False):
        if group["rope_type"] not in known:
            said = f"rotary positions of the type {group['rope_type']} in a {kind} cannot be written {how}"
            return Refusal(said, f"these can: {', '.join(known)}")
        if group["partial_rotary_factor"] != 1.0 and kind != "phi3":
            return Refusal(f"a {kind} that rotates part of each head cannot be written {how}", "give another model")
    return None


def window_pattern(config: Mapping[str, Any]) -> int | None:
    """Every which layer of a gemma3 sees all, where that is one number and one of them does; None otherwise."""
    windows = sliding(config)
    if all(windows):
        return None
    every = windows.index(False) + 1
    return every if windows == [(layer + 1) % every != 0 for layer in range(len(windows))] else None


def context(config: Mapping[str, Any]) -> int:
    """How many tokens a runtime may hold that knows neither phi3's attention window nor its long rotary factors."""
    length = int(config["max_position_embeddings"])
    if config.get("model_type") == "phi3":
        length = min(length, config.get("sliding_window") or length)
        group = rotary(config)
        if group["rope_type"] == "longrope":
            length = min(length, first_context(config))
    return length


def first_context(config: Mapping[str, Any]) -> int:
    """The context that a model with long rotary factors was first trained with."""
    found = rotary(config).get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return int(found or config["max_position_embeddings"])


def stretch(config: Mapping[str, Any]) -> float:
    """What multiplies the rotary sines and cosines of a model with long rotary factors."""
    group, first = rotary(config), first_context(config)
    factor = group.get("factor") or config["max_position_embeddings"] / first
    usual = math.sqrt(1 + math.log(factor) / math.log(first)) if factor > 1 else 1.0
    return float(group.get("attention_factor") or usual)


def _own(config: Mapping[str, Any]) -> str | None:
    """What an architecture's graph in llama.cpp has no place for."""
    kind, hidden, heads = config["model_type"], config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    if size % 2:
        return f"heads have the odd size {size}"
    if kind == "phi3" and size * heads != hidden:
        return f"{heads} heads of size {size} are not as wide as the model ({hidden})"
    wanted = "gelu_pytorch_tanh" if kind == "gemma3_text" else "silu"
    activation = config.get("hidden_activation" if kind == "gemma3_text" else "hidden_act") or wanted
    if activation != wanted:
        return f"the activation is {activation}, not {wanted}"
    if kind == "gemma3_text":
        return next(
            (f"{k} is set" for k in ("attn_logit_softcapping", "use_bidirectional_attention") if config.get(k)), None
        )
    return "some layers attend to a window" if kind != "phi3" and any(sliding(config)) else None
