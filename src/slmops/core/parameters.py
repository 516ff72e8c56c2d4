"""How many weights a decoder has, from its configuration alone: exact, without torch, for the architectures in KINDS.

A tied output matrix counts once. Of a model with experts, `active` is what one token is computed with. The numbers equal those of
the model that transformers builds (a test instantiates each architecture of the catalogue without memory and compares); the
configuration is that of a Hugging Face model folder, whose `text_config` is taken where the model also sees pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

HEADS = {
    "qwen3": 128,
    "gemma": 256,
    "gemma2": 256,
    "gemma3_text": 256,
    "gpt_oss": 64,
    "ministral3": 128,
    "ernie4_5": 128,
}
"""Widths of heads of architectures that have one whatever the model's width, where the configuration does not say."""


@dataclass(frozen=True)
class Weights:
    """A model's weights by what they are.

    Attributes:
        embedding: of the token embedding; `output`: of the output matrix, 0 where it is the embedding again.
        matrices: of the linear layers of all blocks; `vectors`: norms, biases, convolutions and other small ones.
        idle: of the experts that a token does not go through, a part of `matrices` and `vectors`.
    """

    embedding: int
    output: int
    matrices: int
    vectors: int
    idle: int = 0

    @property
    def total(self) -> int:
        """All weights."""
        return self.embedding + self.output + self.matrices + self.vectors

    @property
    def active(self) -> int:
        """Those that a token is computed with."""
        return self.total - self.idle


@dataclass(frozen=True)
class Part:
    """Weights of a piece of a block; pieces add up."""

    matrices: int = 0
    vectors: int = 0
    idle: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(self.matrices + other.matrices, self.vectors + other.vectors, self.idle + other.idle)

    def __mul__(self, times: int) -> Part:
        return Part(self.matrices * times, self.vectors * times, self.idle * times)


def language(config: Config) -> Config:
    """The configuration of the language model inside another, or the configuration itself."""
    inner: Config = config.get("text_config") or config
    return inner


def kind_of(config: Config) -> str:
    """The `model_type` of the language model; "" if none is named."""
    return str(language(config).get("model_type") or config.get("model_type") or "")


def head_width(c: Config) -> int:
    """The width of a head of attention: as given, as the architecture has it, or the model's width by heads."""
    return int(c.get("head_dim") or HEADS.get(kind_of(c)) or c["hidden_size"] // c["num_attention_heads"])


def shared_heads(c: Config) -> int:
    """Heads of keys and values."""
    return int(c.get("num_key_value_heads") or c["num_attention_heads"])


def count(config: Config) -> Weights:
    """The weights of the decoder that a configuration describes.

    Raises:
        KeyError: its `model_type` is not in KINDS, or a width is missing.
    """
    c = language(config)
    kind = KINDS[kind_of(config)]
    table = int(c["vocab_size"]) * int(c["hidden_size"])
    tied = bool(c.get("tie_word_embeddings", config.get("tie_word_embeddings", kind.tied)))
    body = Part(vectors=kind.final * int(c["hidden_size"]) + (int(c["vocab_size"]) if kind.output_bias else 0))
    for layer in range(int(c["num_hidden_layers"])):
        body += kind.block(c, layer)
    return Weights(table, 0 if tied else table, body.matrices, body.vectors, body.idle)


def _linear(inputs: int, outputs: int, bias: Any = False) -> Part:
    return Part(inputs * outputs, outputs if bias else 0)


def _attention(c: Config, bias: Any = None, out_bias: Any = None, normed: str = "") -> Part:
    """Queries, keys, values and output. `normed`: queries and keys are, by `head` or over their whole `width`."""
    hidden, head = int(c["hidden_size"]), head_width(c)
    queries, keys = int(c["num_attention_heads"]) * head, shared_heads(c) * head
    bias = c.get("attention_bias", False) if bias is None else bias
    part = _linear(hidden, queries, bias) + _linear(hidden, keys, bias) * 2
    part += _linear(queries, hidden, bias if out_bias is None else out_bias)
    return part + Part(vectors={"": 0, "head": 2 * head, "width": queries + keys}[normed])


def _feed(c: Config, matrices: int = 3, bias: Any = None, width: int | None = None) -> Part:
    """Up (and gate) and down."""
    hidden, ffn = int(c["hidden_size"]), int(c["intermediate_size"]) if width is None else width
    bias = c.get("mlp_bias", False) if bias is None else bias
    return _linear(hidden, ffn, bias) * (matrices - 1) + _linear(ffn, hidden, bias)


def _norms(c: Config, number: int) -> Part:
    return Part(vectors=number * int(c["hidden_size"]))


def _experts(c: Config, width: int, bias: bool = False) -> Part:
    """A router, and experts of three matrices of which a token takes a few."""
    hidden, experts, taken = (int(c[key]) for key in ("hidden_size", "num_local_experts", "num_experts_per_tok"))
    one = _linear(hidden, width, bias) * 2 + _linear(width, hidden, bias)
    every = one * experts
    return _linear(hidden, experts, bias) + Part(
        every.matrices, every.vectors, sum(vars(one).values()) * (experts - taken)
    )


def _plain(norms: int = 2, normed: str = "", **attention: Any) -> Callable[[Config, int], Part]:
    """Root-mean-square norms, attention, and a gated feed-forward layer."""
    return lambda c, layer: _norms(c, norms) + _attention(c, normed=normed, **attention) + _feed(c)


def _phi(c: Config, layer: int) -> Part:
    normed = 4 * head_width(c) if c.get("qk_layernorm") else 0
    return _norms(c, 2) + Part(vectors=normed) + _attention(c, bias=True) + _feed(c, 2, bias=True)


def _bitnet(c: Config, layer: int) -> Part:
    inner = Part(vectors=int(c["hidden_size"]) + int(c["intermediate_size"]))
    return _norms(c, 2) + inner + _attention(c) + _feed(c, bias=False)


def _stablelm(c: Config, layer: int) -> Part:
    heads = int(c["num_attention_heads"]) + shared_heads(c) if c.get("qk_layernorm") else 0
    norms = _norms(c, 2 if c.get("use_parallel_residual") else 4) + Part(vectors=heads * head_width(c))
    return norms + _attention(c, bias=c.get("use_qkv_bias", False), out_bias=False) + _feed(c, bias=False)


def _cohere(c: Config, layer: int) -> Part:
    heads = int(c["num_attention_heads"]) + shared_heads(c) if c.get("use_qk_norm") else 0
    return _norms(c, 1) + Part(vectors=heads * head_width(c)) + _attention(c) + _feed(c, bias=False)


def _starcoder2(c: Config, layer: int) -> Part:
    bias = c.get("use_bias", True)
    return _norms(c, 4) + _attention(c, bias=bias) + _feed(c, 2, bias=bias)


def _granitemoe(c: Config, layer: int) -> Part:
    return _norms(c, 2) + _attention(c) + _experts(c, int(c["intermediate_size"]))


def _granite_hybrid(c: Config, layer: int) -> Part:
    mixer = _mamba2(c) if c["layer_types"][layer] == "mamba" else _attention(c)
    part = _norms(c, 2) + mixer + _feed(c, bias=False, width=int(c["shared_intermediate_size"]))
    return part + _experts(c, int(c["intermediate_size"])) if c.get("num_local_experts") else part


def _mamba2(c: Config) -> Part:
    """The state-space layer of arXiv 2405.21060."""
    hidden, heads = int(c["hidden_size"]), int(c["mamba_n_heads"])
    inner, carried = state_widths(c)
    bias, biased = c.get("mamba_proj_bias", False), c.get("mamba_conv_bias", True)
    conv = carried * (int(c["mamba_d_conv"]) + (1 if biased else 0))
    part = _linear(hidden, inner + carried + heads, bias) + _linear(inner, hidden, bias)
    return part + Part(vectors=conv + 3 * heads + inner)


def state_widths(c: Config) -> tuple[int, int]:
    """Of a Mamba 2 layer: its inner width, and the channels of its convolution."""
    inner = int(c["mamba_expand"]) * int(c["hidden_size"])
    return inner, inner + 2 * int(c["mamba_n_groups"]) * int(c["mamba_d_state"])


def _lfm2(c: Config, layer: int) -> Part:
    hidden, bias = int(c["hidden_size"]), bool(c.get("conv_bias", False))
    if c["layer_types"][layer] == "full_attention":
        mixer = _attention(c, bias=False, normed="head")
    else:
        taps = Part(vectors=hidden * (int(c["conv_L_cache"]) + bias))
        mixer = _linear(hidden, 3 * hidden, bias) + taps + _linear(hidden, hidden, bias)
    return _norms(c, 2) + mixer + _feed(c, bias=False, width=lfm2_width(c))


def lfm2_width(c: Config) -> int:
    """The feed-forward width of LFM2: as given, or two thirds of it, scaled and rounded up."""
    width = int(c.get("block_ff_dim") or c["intermediate_size"])
    if c.get("block_auto_adjust_ff_dim", True):
        step = int(c.get("block_multiple_of", 256))
        width = int(c.get("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
        width = step * -(-width // step)
    return width


def _gpt_oss(c: Config, layer: int) -> Part:
    sinks = Part(vectors=int(c["num_attention_heads"]))
    attention = _attention(c, bias=c.get("attention_bias", True))
    return _norms(c, 2) + sinks + attention + _experts(c, int(c["intermediate_size"]), bias=True)


def _arcee(c: Config, layer: int) -> Part:
    return _norms(c, 2) + _attention(c) + _feed(c, 2)


def _nemotron(c: Config, layer: int) -> Part:
    return _norms(c, 4) + _attention(c) + _feed(c, 2)


def _ernie(c: Config, layer: int) -> Part:
    bias = c.get("use_bias", False)
    return _norms(c, 2) + _attention(c, bias=bias) + _feed(c, bias=bias)


@dataclass(frozen=True)
class Kind:
    """An architecture.

    Attributes:
        block: the weights of one block: configuration and number of the block.
        tied: the output matrix is the embedding where the configuration does not say.
        final: vectors of the model's width behind the last block.
        output_bias: the output matrix has one.
    """

    block: Callable[[Config, int], Part]
    tied: bool = False
    final: int = 1
    output_bias: bool = False


KINDS: dict[str, Kind] = {
    "llama": Kind(_plain()),
    "smollm3": Kind(_plain(), tied=True),
    "mistral": Kind(_plain(bias=False)),
    "ministral": Kind(_plain(bias=False)),
    "ministral3": Kind(_plain(bias=False)),
    "qwen2": Kind(_plain(bias=True, out_bias=False)),
    "qwen3": Kind(_plain(normed="head")),
    "phi": Kind(_phi, final=2, output_bias=True),
    "phi3": Kind(_plain(bias=False)),
    "gemma": Kind(_plain(), tied=True),
    "gemma2": Kind(_plain(norms=4), tied=True),
    "gemma3_text": Kind(_plain(norms=4, normed="head"), tied=True),
    "granite": Kind(_plain()),
    "granitemoe": Kind(_granitemoe),
    "granitemoehybrid": Kind(_granite_hybrid),
    "olmo": Kind(_plain(norms=0), final=0),
    "olmo2": Kind(_plain(normed="width")),
    "olmo3": Kind(_plain(normed="width")),
    "lfm2": Kind(_lfm2, tied=True),
    "bitnet": Kind(_bitnet),
    "stablelm": Kind(_stablelm, final=2),
    "exaone": Kind(_plain(bias=False)),
    "exaone4": Kind(_plain(bias=False, normed="head")),
    "cohere": Kind(_cohere, tied=True),
    "cohere2": Kind(_cohere, tied=True),
    "gpt_oss": Kind(_gpt_oss),
    "arcee": Kind(_arcee),
    "nemotron": Kind(_nemotron, final=2),
    "starcoder2": Kind(_starcoder2, tied=True, final=2),
    "ernie4_5": Kind(_ernie, tied=True),
}
"""Architectures whose weights can be counted, by `model_type`. `exaone` (3 and 3.5) is not in transformers: its code comes with the
model."""
