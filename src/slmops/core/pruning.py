"""What pruning makes of a model's config.json, from the numbers alone: so that it is refused before anything is spent on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmops.core.runtimes import Refusal
from slmops.core.spec import Prune

KINDS = ("gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""Values of model_type whose blocks are known."""
FFN_STEPS = (256, 128, 64, 32)
"""Feed-forward widths are multiples of one of them, so that rows divide into blocks of int4, and wide ones into those of k-quants."""
_PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern", "max_window_layers")
"""Settings that say by a block's number whether it has a window: `layer_types` says it for each."""


@dataclass(frozen=True)
class Widths:
    """A decoder's numbers. `head`: width of a head; heads that share keys and values are a group, of which there are `kv_heads`."""

    kind: str
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    head: int

    @property
    def shared_by(self) -> int:
        """Heads in a group."""
        return self.heads // self.kv_heads


def widths(config: Mapping[str, Any]) -> Widths | Refusal:
    """The numbers of a config.json, if its blocks are known."""
    kind = config.get("model_type")
    if kind not in KINDS:
        return Refusal(f"models of the type {kind} cannot be pruned", f"these can: {', '.join(KINDS)}")
    numbers = {
        k: config.get(k) for k in ("num_hidden_layers", "intermediate_size", "num_attention_heads", "hidden_size")
    }
    numbers["num_key_value_heads"] = config.get("num_key_value_heads") or config.get("num_attention_heads")
    odd = [name for name, number in numbers.items() if not isinstance(number, int) or number < 1]
    if odd:
        return Refusal(f"config.json does not give one number as {odd[0]}", "give a model whose blocks are all alike")
    layers, ffn, heads, hidden, shared = (int(number) for number in numbers.values() if number)
    return Widths(str(kind), layers, ffn, heads, shared, config.get("head_dim") or hidden // heads)


def ffn_step(ffn: int) -> int:
    """The largest step that divides a width into sixteen or more; the smallest, if there is none."""
    return next((step for step in FFN_STEPS if ffn % step == 0 and ffn >= 16 * step), FFN_STEPS[-1])


def ffn_left(ffn: int, share: float) -> int:
    """Neurons that stay where `share` of them is to go: the nearest multiple of `ffn_step`."""
    step = ffn_step(ffn)
    return round(ffn * (1 - share) / step) * step


def groups_left(kv_heads: int, share: float) -> int:
    """Key/value heads that stay, each with the heads that share it."""
    return round(kv_heads * (1 - share))


def refusal(config: Mapping[str, Any], prune: Prune) -> Refusal | None:
    """Why a model with this config.json cannot be pruned so, if it cannot."""
    found = widths(config)
    if isinstance(found, Refusal):
        return found
    if prune.layers >= found.layers:
        return Refusal(f"{prune.layers} blocks cannot be taken out of {found.layers}", "leave at least one")
    for name, share, count, left, unit in (
        ("ffn", prune.ffn, found.ffn, ffn_left(found.ffn, prune.ffn), f"neurons in steps of {ffn_step(found.ffn)}"),
        ("heads", prune.heads, found.kv_heads, groups_left(found.kv_heads, prune.heads), "key/value heads"),
    ):
        if share and not 0 < left < count:
            least = (ffn_step(count) if name == "ffn" else 1) / count
            hint = f"give a share from {least:.3g} to {1 - least:.3g}" if least < 1 else f"take `{name}` out"
            what = "none" if left <= 0 else "all"
            return Refusal(f"{name} {share:g} leaves {what} of {count} {unit}", hint)
    return None


def pruned(config: Mapping[str, Any], prune: Prune) -> dict[str, Any]:
    """The config.json that a pruned model will have, as far as runtimes look at it: the last blocks stand for those that go."""
    found = widths(config)
    assert isinstance(found, Widths)
    out = shorter(config, range(found.layers - prune.layers)) if prune.layers else dict(config)
    if prune.ffn or prune.heads:
        out = narrower(out, ffn_left(found.ffn, prune.ffn), groups_left(found.kv_heads, prune.heads))
    return out


def shorter(config: Mapping[str, Any], kept: Sequence[int], kinds: Sequence[str] | None = None) -> dict[str, Any]:
    """config.json with the blocks `kept` alone.

    Args:
        kinds: the type of attention of each block before, where it is known better than from config.json.
    """
    kinds = kinds or config.get("layer_types")
    out = {**config, "num_hidden_layers": len(kept)}
    if kinds:
        out = {k: v for k, v in out.items() if k not in _PATTERNS}
        out["layer_types"] = [kinds[i] for i in kept]
    return out


def narrower(config: Mapping[str, Any], ffn: int, groups: int) -> dict[str, Any]:
    """config.json with that many neurons and key/value heads; the size of a head stays."""
    found = widths(config)
    assert isinstance(found, Widths)
    return {
        **config, "intermediate_size": ffn, "num_attention_heads": groups * found.shared_by, "num_key_value_heads": groups,
        "head_dim": found.head,
    }  # fmt: skip
