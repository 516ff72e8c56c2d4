"""What a decoder keeps of the tokens that it has read: keys and values of attention, and the states of layers without it.

Grouped heads and sliding windows are counted: a layer that sees the last w tokens needs to keep no more than w of them. A runtime
may keep more (ONNX Runtime GenAI and llama.cpp by default keep every token of every layer): `windows=False` counts that.
"""

from __future__ import annotations

from slmops.core.parameters import Config, head_width, kind_of, language, shared_heads, state_widths

PATTERNS = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2, "exaone4": 4}
"""Of architectures that mix: every so many-th layer sees everything, the others a window."""


def views(config: Config) -> list[int | None]:
    """What each layer of attention sees: tokens of its window, or None for all. Layers without attention are left out.

    Raises:
        KeyError: a width is missing.
    """
    c, kind = language(config), kind_of(config)
    layers = int(c["num_hidden_layers"])
    window = c.get("sliding_window")
    if c.get("use_sliding_window") is False or (kind in ("qwen2", "qwen3") and not c.get("use_sliding_window")):
        window = None
    types = c.get("layer_types")
    if types:
        seen = {"full_attention": None, "attention": None, "sliding_attention": window, "local_attention": window}
        return [seen[name] for name in types if name in seen]
    if window is None:
        return [None] * layers
    step = int(c.get("sliding_window_pattern") or PATTERNS.get(kind) or 0)
    return [None if step and (layer + 1) % step == 0 else int(window) for layer in range(layers)]


def per_token(config: Config) -> int:
    """Numbers that a token leaves in the cache while no window is full."""
    c = language(config)
    return len(views(config)) * 2 * shared_heads(c) * head_width(c)


def size(config: Config, context: int, batch: int = 1, bytes_: float = 2, windows: bool = True) -> float:
    """Bytes kept for `batch` sequences of `context` tokens, at `bytes_` a number; states of other layers are float32."""
    c = language(config)
    width = 2 * shared_heads(c) * head_width(c)
    seen = sum(min(context, window) if windows and window else context for window in views(config))
    return batch * (seen * width * bytes_ + 4 * states(config))


def states(config: Config) -> int:
    """Numbers that the layers without attention keep, however long the text is."""
    c = language(config)
    types = list(c.get("layer_types") or ())
    kept = types.count("conv") * int(c["hidden_size"]) * int(c.get("conv_L_cache", 0))
    if "mamba" in types:
        inner, carried = state_widths(c)
        kept += types.count("mamba") * (inner * int(c["mamba_d_state"]) + carried * int(c["mamba_d_conv"]))
    return kept
