"""A decoder as ExecuTorch's runner for text feeds it, in operations of torch: made to be exported, not trained.

`forward(tokens (1, n) int64, start (1,) int64)` puts n tokens into the context from position `start`, one or many at a time, and gives the
logits after the last of them, float32 (1, vocabulary). Keys and values are buffers of a fixed size. Attention is the runtime's own
operation for language models (`llama::custom_sdpa`), which looks at what is filled of the buffers; in layers that attend to a window
narrower than the context, at all of them with a mask.

Matrices of few bits are what XNNPACK has: int8 with one scale a row, or int4 with one bfloat16 scale for each `block_size`; in both, what
goes into a product is rounded to int8 with one scale a token, while it runs. The table of tokens is int8 or int4 with float16 scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slmops.convert.gguf import sizes, tied, turning
from slmops.convert.rounding import AT_ONCE, CANDIDATES
from slmops.core import runtimes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

LOWEST = -3.4028234663852886e38
"""Added to scores of keys that a token does not see."""
SMALLEST = 2.0**-100
"""Scales below it are not taken: a group of zeros has the scale 1."""


@dataclass
class Weights:
    """Reads matrices by name and gives what computes with them.

    Attributes:
        read: the values of a tensor, float32; KeyError where there is none.
        precision, table: of the layers' matrices, and of the embedding and the output matrix.
        block_size: weights that share a scale in int4.
    """

    read: Callable[[str], Array]
    precision: str
    table: str
    block_size: int
    rounded: int = 0
    in_int8: list[str] = field(default_factory=list)
    _kept: dict[str, Any] = field(default_factory=dict)

    def codes(self, name: str) -> tuple[Any, Any] | None:
        """Codes, int8 (outputs, inputs), and scales, float32 (outputs, groups), of a matrix; None if it is not rounded."""
        import torch

        precision = self.table if name in ("model.embed_tokens", "lm_head") else self.precision
        if precision == "fp32":
            return None
        if name not in self._kept:
            values = self.read(f"{name}.weight")
            whole, rest = divmod(values.shape[1], self.block_size)
            blocks = precision == "int4" and whole > 1 and not rest  # one group a row is int8's form
            if precision == "int4" and not blocks:
                self.in_int8.append(name)
            bits, size = (4, self.block_size) if blocks else (8, values.shape[1])
            self._kept[name] = round_up(torch.from_numpy(values), bits, size)
            self.rounded += 1
        kept: tuple[Any, Any] = self._kept[name]
        return kept

    def tensor(self, name: str) -> Any:
        """A tensor as it is, float32."""
        import torch

        return torch.from_numpy(self.read(name))

    def bias(self, name: str) -> Any:
        """The bias of a layer, None if it has none."""
        try:
            return self.tensor(f"{name}.bias")
        except KeyError:
            return None


def round_up(values: Any, bits: int, block_size: int) -> tuple[Any, Any]:
    """Codes and scales of a matrix whose scales are above zero, as XNNPACK wants them; of several scales the one of least squared error.

    Law: values that lie on such a grid stay as they are, where a group has the least code or the greatest.

    Args:
        values: float32 (outputs, inputs).
        block_size: weights that share a scale; inputs are a multiple of it.

    Returns:
        int8 (outputs, inputs), from -2^(bits-1) to 2^(bits-1) - 1, and float32 (outputs, groups), in 4 bits such that bfloat16 holds them.
    """
    import torch

    half, rows = 1 << (bits - 1), len(values)
    codes, scales = torch.empty(values.shape, dtype=torch.int8), torch.empty(rows, values.shape[1] // block_size)
    some = max(1, AT_ONCE // values.shape[1])
    for start in range(0, rows, some):
        groups = values[start : start + some].reshape(-1, scales.shape[1], block_size)
        largest = groups.abs().amax(-1)
        best, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
        exact = [(half - 0.5) / half, (half - 0.5) / (half - 1)]
        for factor in [*exact, *CANDIDATES]:
            scale = largest * (factor / (half - 0.5))
            scale = scale.to(torch.bfloat16).float() if bits == 4 else scale
            scale = torch.where(scale < SMALLEST, 1.0, scale)
            steps = (groups / scale[..., None]).round().clamp(-half, half - 1)
            error = (groups - steps * scale[..., None]).square().sum(-1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        scales[start : start + some] = best
        steps = (groups / best[..., None]).round().clamp(-half, half - 1)
        codes[start : start + some] = steps.reshape(-1, values.shape[1]).to(torch.int8)
    return codes, scales


def build(config: Mapping[str, Any], weights: Weights, context: int) -> Any:
    """The decoder, a `torch.nn.Module`.

    Args:
        config: one that `runtimes.executorch` takes.
        context: tokens that keys and values have room for.
    """
    import torch
    from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    from torch import nn
    from torch.nn import functional as F
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    kind, hidden = config["model_type"], config["hidden_size"]
    check: Any = torch._check
    heads, size, groups = sizes(config)
    gemma = kind == "gemma3_text"
    window = (config.get("sliding_window") or 4096) if gemma else context
    slides = [slide and window < context for slide in (runtimes.sliding(config) if gemma else [])]
    kinds = ["sliding_attention" if gemma and slide else "full_attention" for slide in runtimes.sliding(config)]

    class Linear(nn.Module):
        """A product with a matrix, in the form in which it is stored."""

        weight: Any
        scales: Any
        zeros: Any
        bias: Any

        def __init__(self, name: str) -> None:
            super().__init__()
            found = weights.codes(name)
            self.register_buffer("bias", weights.bias(name))
            self.bits = 0
            if found is None:
                self.register_buffer("weight", weights.tensor(f"{name}.weight"))
                return
            codes, scales = found
            self.bits = 8 if scales.shape[1] == 1 else 4
            self.block = (1, codes.shape[1] // scales.shape[1])
            self.register_buffer("weight", codes)
            self.register_buffer("scales", scales)
            self.register_buffer("zeros", torch.zeros_like(scales, dtype=torch.int8))

        def forward(self, x: Any) -> Any:
            if not self.bits:
                return F.linear(x, self.weight, self.bias)
            each, low, high = (1, *(1 for _ in x.shape[1:-1]), x.shape[-1]), -128, 127
            scale, zero = choose_qparams_affine(
                x, MappingType.ASYMMETRIC, each, torch.int8, low, high, zero_point_dtype=torch.int8
            )
            x = quantize_affine(x, each, scale, zero, torch.int8, low, high)
            x = dequantize_affine(x, each, scale, zero, torch.int8, low, high)
            low, high = -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
            weight = dequantize_affine(self.weight, self.block, self.scales, self.zeros, torch.int8, low, high)
            return F.linear(x, weight, self.bias)

    class Table(nn.Module):
        """The table of tokens."""

        weight: Any
        scales: Any

        def __init__(self) -> None:
            super().__init__()
            name = "model.embed_tokens"
            found = weights.codes(name)
            self.bits = 0
            if found is None:
                self.register_buffer("weight", weights.tensor(f"{name}.weight"))
                return
            codes, scales = found
            self.bits = 8 if scales.shape[1] == 1 else 4
            if self.bits == 4:
                shifted = (codes.to(torch.int16) + 8).to(torch.uint8)
                codes = (shifted[:, 0::2] << 4) | shifted[:, 1::2]
            self.register_buffer("weight", codes)
            self.register_buffer("scales", (scales[:, 0] if self.bits == 8 else scales).half())

        def forward(self, ids: Any) -> Any:
            ops = torch.ops.quantized_decomposed
            if not self.bits:
                return F.embedding(ids, self.weight)
            if self.bits == 8:
                return ops.embedding_byte.dtype(self.weight, self.scales, None, -128, 127, ids, dtype=torch.float32)
            return ops.embedding_4bit.dtype(self.weight, self.scales, None, -8, 7, ids, dtype=torch.float32)

    class Norm(nn.Module):
        weight: Any
        mean: Any

        def __init__(self, name: str) -> None:
            super().__init__()
            self.register_buffer("weight", weights.tensor(f"{name}.weight") + (1.0 if gemma else 0.0))
            self.register_buffer("mean", torch.full((1, len(self.weight)), 1 / len(self.weight)))

        def forward(self, x: Any) -> Any:
            mean = F.linear(x * x, self.mean)  # as a product: a mean would go to the processor by another way
            return x * torch.rsqrt(mean + config["rms_norm_eps"]) * self.weight

    def turns(layers: str) -> tuple[Any, Any]:
        """Rotary cosines and sines, (context, size); 1 and 0 where a head is not turned."""
        import numpy as np

        speeds, stretch = turning(config, layers)
        rotated = 2 * len(speeds)
        angles = np.outer(np.arange(context, dtype=np.float64), np.concatenate([speeds, speeds]))
        cos, sin = np.ones((context, size), np.float32), np.zeros((context, size), np.float32)
        cos[:, :rotated], sin[:, :rotated] = stretch * np.cos(angles), stretch * np.sin(angles)
        return torch.from_numpy(cos), torch.from_numpy(sin)

    def quarter() -> Any:
        """The matrix that turns a head by a quarter, (size, size): what sines go with."""
        half = int(size * runtimes.rotary(config)["partial_rotary_factor"]) // 2
        matrix = torch.zeros(size, size)
        for place in range(half):
            matrix[place, place + half], matrix[place + half, place] = -1.0, 1.0
        return matrix

    class Attention(nn.Module):
        quarter: Any
        keys: Any
        values: Any

        def __init__(self, name: str) -> None:
            super().__init__()
            names = ["qkv_proj"] if kind == "phi3" else ["q_proj", "k_proj", "v_proj"]
            self.into = nn.ModuleList(Linear(f"{name}.{part}") for part in names)
            self.out = Linear(f"{name}.o_proj")
            normed = kind in ("qwen3", "gemma3_text")
            self.norms = nn.ModuleList(Norm(f"{name}.{part}_norm") for part in ("qk" if normed else ""))
            self.register_buffer("quarter", quarter())
            for part in ("keys", "values"):
                self.register_buffer(part, torch.zeros(1, context, groups, size))
            self.scale = (config.get("query_pre_attn_scalar") or 256) ** -0.5 if gemma else size**-0.5

        def forward(self, x: Any, start: Any, cos: Any, sin: Any, mask: Any) -> Any:
            if kind == "phi3":
                parts = self.into[0](x).split([heads * size, groups * size, groups * size], -1)
            else:
                parts = [layer(x) for layer in self.into]
            q, k, v = (part.view(1, -1, part.shape[-1] // size, size) for part in parts)
            if len(self.norms):
                q, k = self.norms[0](q), self.norms[1](k)
            q, k = (part * cos + F.linear(part, self.quarter) * sin for part in (q, k))
            torch.ops.llama.update_cache(k, self.keys, start)
            torch.ops.llama.update_cache(v, self.values, start)
            if mask is None:
                mixed = torch.ops.llama.custom_sdpa(q, self.keys, self.values, start, None, 0.0, True, self.scale)
            else:
                mixed = torch.ops.llama.custom_sdpa(q, self.keys, self.values, start, mask, 0.0, False, self.scale)
            return self.out(mixed.view(1, -1, heads * size))

    def gelu(x: Any) -> Any:
        """With a hyperbolic tangent, as Gemma has it: XNNPACK's own operation is the other one, without saying so."""
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))

    class FeedForward(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            names = ["gate_up_proj"] if kind == "phi3" else ["gate_proj", "up_proj"]
            self.into = nn.ModuleList(Linear(f"{name}.{part}") for part in names)
            self.out = Linear(f"{name}.down_proj")

        def forward(self, x: Any) -> Any:
            gate, up = self.into[0](x).chunk(2, -1) if kind == "phi3" else (layer(x) for layer in self.into)
            return self.out((gelu(gate) if gemma else F.silu(gate)) * up)

    class Layer(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            parts = ["input_layernorm", "post_attention_layernorm"]
            parts += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if gemma else []
            self.norms = nn.ModuleList(Norm(f"{name}.{part}") for part in parts)
            self.attention, self.feed_forward = Attention(f"{name}.self_attn"), FeedForward(f"{name}.mlp")

        def forward(self, x: Any, start: Any, cos: Any, sin: Any, mask: Any) -> Any:
            made = self.attention(self.norms[0](x), start, cos, sin, mask)
            if not gemma:
                x = x + made
                return x + self.feed_forward(self.norms[1](x))
            x = x + self.norms[1](made)
            return x + self.norms[3](self.feed_forward(self.norms[2](x)))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = Table()
            self.layers = nn.ModuleList(
                Layer(f"model.layers.{number}") for number in range(config["num_hidden_layers"])
            )
            self.norm = Norm("model.norm")
            self.head = Linear("model.embed_tokens" if tied(config) else "lm_head")
            for layers in sorted(set(kinds)):
                for part, values in zip(("cos", "sin"), turns(layers), strict=True):
                    self.register_buffer(f"{layers}_{part}", values)

        def forward(self, tokens: Any, start: Any) -> Any:
            new = tokens.shape[1]
            at = start + torch.arange(new)
            first = start[0].item()
            check(first >= 0)
            check(first + new <= context)
            how = {
                layers: [F.embedding(at.unsqueeze(1), getattr(self, f"{layers}_{part}")) for part in ("cos", "sin")]
                for layers in set(kinds)
            }
            mask = None
            if any(slides):
                back = at.unsqueeze(1) - torch.arange(context).unsqueeze(0)
                mask = torch.where((back >= 0) & (back < window), 0.0, LOWEST)
            x = self.table(tokens)
            if gemma:
                x = x * math.sqrt(hidden)
            for number, layer in enumerate(self.layers):
                narrow = mask if slides and slides[number] else None
                x = layer(x, first, *how[kinds[number]], narrow)
            logits = self.head(self.norm(x[:, -1:]))[:, 0]
            cap = config.get("final_logit_softcapping") if gemma else None
            return torch.tanh(logits / cap) * cap if cap else logits

    return Decoder().eval()
