"""Llama and Qwen3 written out: the forward pass without what the loss does not need.

Residual stream and norms are float32, products bfloat16 if asked. In the last layer everything after the attention runs
only at the positions that carry loss. Low-rank additions and bottlenecks of a tuning are part of it. `Network` checks that
this gives the logits of the model itself before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slmops.train.batches import Part

if TYPE_CHECKING:
    import torch

    from slmops.train.network import Network

    Weights = Mapping[str, torch.Tensor]

ROWS = 64
"""Rows whose number differs from batch to batch are filled up to a multiple of this: the CPU library compiles and keeps a
kernel for every shape it meets, which costs time and, over thousands of batches, gigabytes."""


class Written:
    """One forward pass with given weights.

    Attributes:
        heads, groups, size: attention heads, key-value heads, and the width of one.
        layers: how many.
    """

    def __init__(self, network: Network, weights: Weights, dropout: float = 0.0) -> None:
        import torch

        config = network.model.config
        self.network, self.weights, self.dropout = network, weights, dropout
        self.low = torch.bfloat16 if network.bf16 else torch.float32
        self.epsilon, self.heads = config.rms_norm_eps, config.num_attention_heads
        self.groups = config.num_key_value_heads
        self.size: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.layers: int = config.num_hidden_layers

    def here(self, layer: int) -> str:
        """What the names of a layer's weights begin with."""
        return f"{self.network.prefix}layers.{layer}."

    def plain(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """A linear layer as it is in the base."""
        import torch

        weight = self.weights[f"{name}.weight"]
        if not weight.is_floating_point():  # held in 4 bits
            held: torch.Tensor = self.network.modules[name](x).to(self.low)
            return held
        bias = self.weights.get(f"{name}.bias")
        return torch.nn.functional.linear(x, weight.to(self.low), bias.to(self.low) if bias is not None else None)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """A linear layer with what a tuning adds to it."""
        added = self.network.layers.get(name)
        if added is None:
            return self.plain(x, name)
        return added.forward(self.weights, x, self.plain(x, f"{name}.base_layer"), self.low, self.network.learning)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """RMS norm in float32."""
        import torch

        return torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), self.weights[f"{name}.weight"], self.epsilon)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(…,) ids to (…, hidden)."""
        import torch

        table = self.weights[self.network.embedding]
        return torch.nn.functional.dropout(torch.nn.functional.embedding(ids, table), self.dropout)

    def queries(
        self, x: torch.Tensor, here: str, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, heads, T, size), keys and values (B, groups, T, size) of (B, T, hidden), float32, rotated.

        Args:
            cos, sin: what `rotate` takes.
        """
        rows, width = x.shape[:2]
        h = self.norm(x, here + "input_layernorm").to(self.low)
        q = self.linear(h, here + "self_attn.q_proj").view(rows, width, self.heads, self.size)
        k = self.linear(h, here + "self_attn.k_proj").view(rows, width, self.groups, self.size)
        v = self.linear(h, here + "self_attn.v_proj").view(rows, width, self.groups, self.size)
        if f"{here}self_attn.q_norm.weight" in self.weights:
            q, k = self.norm(q, here + "self_attn.q_norm"), self.norm(k, here + "self_attn.k_norm")
        return rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2).float()

    def rest(self, x: torch.Tensor, attended: torch.Tensor, here: str) -> torch.Tensor:
        """The layer from the attention's result (…, heads * size) on."""
        from torch.nn import functional as F

        x = x + F.dropout(self.linear(attended, here + "self_attn.o_proj").float(), self.dropout)
        h = self.norm(x, here + "post_attention_layernorm").to(self.low)
        inner = F.silu(self.linear(h, here + "mlp.gate_proj")) * self.linear(h, here + "mlp.up_proj")
        out = self.linear(inner, here + "mlp.down_proj").float()
        if f"{here}mlp.beside.down_proj.weight" in self.weights:
            inner = F.silu(self.plain(h, here + "mlp.beside.gate_proj")) * self.plain(h, here + "mlp.beside.up_proj")
            out = out + self.plain(inner, here + "mlp.beside.down_proj").float()
        return x + F.dropout(out, self.dropout)

    def hidden(self, part: Part) -> torch.Tensor:
        """(P, hidden) final hidden states at `part.where`, after the last norm."""
        from torch.nn import functional as F
        from torch.utils.checkpoint import checkpoint

        rows, width = part.ids.shape
        cos, sin = self.network.angles(width)
        if part.positions is None:
            cos, sin = cos[:width], sin[:width]
        else:
            cos, sin = cos[part.positions][:, None], sin[part.positions][:, None]

        def attention(x: torch.Tensor, here: str) -> torch.Tensor:
            q, k, v = self.queries(x, here, cos, sin)
            if self.network.device != "cpu":  # there the bfloat16 kernel takes five to ten times as long on short rows
                q, k, v = q.to(self.low), k.to(self.low), v.to(self.low)
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=part.mask, is_causal=part.mask is None, enable_gqa=self.groups != self.heads
            )
            return attended.transpose(1, 2).reshape(rows, width, self.heads * self.size).to(self.low)

        def block(x: torch.Tensor, here: str) -> torch.Tensor:
            return self.rest(x, attention(x, here), here)

        count = part.where.shape[0]
        where = F.pad(part.where, (0, -count % ROWS))
        x = self.embed(part.ids)
        for layer in range(self.layers - 1):
            if self.network.checkpointing and self.network.learning:
                x = checkpoint(block, x, self.here(layer), use_reentrant=False)
            else:
                x = block(x, self.here(layer))
        here = self.here(self.layers - 1)
        attended = attention(x, here)
        x = self.rest(x.flatten(0, 1)[where], attended.flatten(0, 1)[where], here)
        return self.norm(x[:count], self.network.prefix + "norm")


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: (B, heads, T, size) by half angles (T, size/2) or (B, 1, T, size/2); float32."""
    import torch

    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@dataclass(frozen=True)
class LowRank:
    """PEFT's addition to one linear layer, computed as PEFT does (a test compares them).

    Attributes:
        name: of the layer; its weights are `name.lora_A.default.weight` (rank, in) and `name.lora_B.default.weight` (out,
            rank), and for DoRA `name.lora_magnitude_vector.default.weight` (out,).
        scale: of the product.
        dropout: of the input, while learning.
        base: the layer as it was.
    """

    name: str
    scale: float
    dropout: float
    base: Any

    @classmethod
    def of(cls, model: Any) -> dict[str, LowRank]:
        """Those of a model, by the layer's name."""
        found = {}
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
                drop = module.lora_dropout["default"]
                found[name] = cls(
                    name, float(module.scaling["default"]), float(getattr(drop, "p", 0.0)), module.base_layer
                )
        return found

    def forward(
        self, weights: Weights, x: torch.Tensor, out: torch.Tensor, low: torch.dtype, learning: bool
    ) -> torch.Tensor:
        """The layer's result.

        Args:
            x: (…, in) in `low`.
            out: (…, out), what the layer gave as it was; it is changed in place, so that no copies of it come and go.
        """
        import torch
        from torch.nn import functional as F

        a, b = (weights[f"{self.name}.lora_{part}.default.weight"] for part in "AB")
        dropped = F.dropout(x, self.dropout, training=learning)
        addition = F.linear(F.linear(dropped, a.to(low)), b.to(low))
        magnitude = weights.get(f"{self.name}.lora_magnitude_vector.default.weight")
        if magnitude is None:
            return out.add_(addition, alpha=self.scale)
        with torch.no_grad():
            weight = self.base.weight
            if not weight.is_floating_point():
                from peft.utils.integrations import dequantize_module_weight

                weight = dequantize_module_weight(self.base)
            length = torch.linalg.norm(weight + self.scale * (b @ a), dim=1)
        factor = (magnitude / length).to(low)
        bias = getattr(self.base, "bias", None)
        result: torch.Tensor
        if self.dropout and learning:  # as PEFT: the base sees what was dropped too
            plain = F.linear(dropped, self.base.weight.to(low))
            result = out + (factor - 1) * plain + factor * self.scale * addition
            return result
        plain = out if bias is None else out - bias.to(low)
        result = factor * plain.add_(addition, alpha=self.scale)
        return result if bias is None else result + bias.to(low)
