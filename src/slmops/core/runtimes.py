"""What ONNX Runtime GenAI can take, told from numbers alone: so that a model is refused before anything is spent on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

ARCHITECTURES = (
    "Gemma3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
)  # fmt: skip
HEAD_MULTIPLE = 16


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
    return found and Refusal(found.message, "give a model with other heads")


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
