"""The numbers of a decoder that decide how large it is: from an architecture, or from a model folder, without torch.

The parameter count is exact: from the architecture by the formula (a test compares it with the model), from a folder by
the headers of its safetensors files.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.core.spec import Architecture

FAST = ("llama", "qwen3")
"""Model types whose forward pass `slmops.train.written` writes out."""


@dataclass(frozen=True)
class Form:
    """How a block is built.

    Attributes:
        norms: of a block's width.
        heads_normed: queries and keys have a norm of their own.
        fused: queries, keys and values are one linear layer, and so are gate and up.
    """

    norms: int = 2
    heads_normed: bool = False
    fused: bool = False


KINDS = {
    "llama": Form(), "mistral": Form(), "qwen2": Form(), "qwen3": Form(heads_normed=True), "phi3": Form(fused=True),
    "gemma3_text": Form(norms=4, heads_normed=True),
}  # fmt: skip
"""Model types whose memory can be foreseen."""


@dataclass(frozen=True)
class Shape:
    """Widths in units.

    Attributes:
        kind: `model_type` of the configuration, one of KINDS.
        attention: heads × width of a head; `shared`: the same of keys and values.
        parameters: all weights, tied ones once.
        written_out: slmops computes it by its own forward pass.
    """

    kind: str
    layers: int
    hidden: int
    attention: int
    shared: int
    ffn: int
    vocabulary: int
    tied: bool
    parameters: int
    heads: int = 1
    written_out: bool = True

    @property
    def form(self) -> Form:
        """How a block is built."""
        return KINDS[self.kind]

    @property
    def first(self) -> tuple[str, ...]:
        """The linear layers that see a block's input."""
        return ("qkv_proj",) if self.form.fused else ("q_proj", "k_proj", "v_proj")

    @property
    def wide(self) -> tuple[str, ...]:
        """The linear layers into the feed-forward width."""
        return ("gate_up_proj",) if self.form.fused else ("gate_proj", "up_proj")

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name to (inputs, outputs) of the linear layers of one block."""
        h, a, s, f = self.hidden, self.attention, self.shared, self.ffn
        if self.form.fused:
            return {
                "qkv_proj": (h, a + 2 * s),
                "o_proj": (a, h),
                "gate_up_proj": (h, 2 * f),
                "down_proj": (f, h),
            }
        return {
            "q_proj": (h, a), "k_proj": (h, s), "v_proj": (h, s), "o_proj": (a, h),
            "gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h),
        }  # fmt: skip

    @property
    def in_blocks(self) -> int:
        """Weights of the linear layers of all blocks."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def table(self) -> int:
        """Weights of the embedding, or of the output matrix."""
        return self.vocabulary * self.hidden

    @property
    def matrices(self) -> int:
        """Weights of the linear layers, embedding and output matrix: what int4 rounds."""
        return self.in_blocks + self.table * (1 if self.tied else 2)

    def below(self, bound: int) -> float:
        """Share of the weights that lie in matrices of fewer than `bound`."""
        sizes = [inputs * outputs for inputs, outputs in self.linears.values()]
        small = self.layers * sum(size for size in sizes if size < bound) + (self.table if self.table < bound else 0)
        return small / max(1, self.in_blocks + self.table)

    @classmethod
    def of(cls, architecture: Architecture, vocabulary: int) -> Shape:
        """The shape of a decoder from scratch."""
        head = architecture.hidden // architecture.heads
        return cls(
            kind=architecture.type, layers=architecture.layers, hidden=architecture.hidden,
            attention=architecture.hidden, shared=(architecture.kv_heads or architecture.heads) * head,
            ffn=ffn_width(architecture), vocabulary=vocabulary, tied=architecture.tie_embeddings,
            parameters=parameters(architecture, vocabulary), heads=architecture.heads,
        )  # fmt: skip

    @classmethod
    def of_folder(cls, folder: Path) -> Shape | None:
        """The shape of a model folder; None where it is of no known kind, or config.json does not say its widths."""
        try:
            return cls.of_config(config_of(folder), weights(folder))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @classmethod
    def of_config(cls, config: Mapping[str, Any], parameters: int = 0) -> Shape:
        """The shape that a Hugging Face configuration describes.

        Args:
            parameters: the exact count, where it is known; 0: as the widths say.

        Raises:
            KeyError: it is of no known kind, or names no layers, widths or vocabulary.
        """
        inner = config.get("text_config") or config
        kind = kind_of(config)
        form = KINDS[kind]
        hidden, heads = int(inner["hidden_size"]), int(inner["num_attention_heads"])
        head = int(inner.get("head_dim") or hidden // heads)
        shape = cls(
            kind=kind, layers=int(inner["num_hidden_layers"]),
            hidden=hidden, attention=heads * head, shared=int(inner.get("num_key_value_heads") or heads) * head,
            ffn=int(inner["intermediate_size"]), vocabulary=int(inner["vocab_size"]),
            tied=bool(inner.get("tie_word_embeddings", config.get("tie_word_embeddings", True))), parameters=parameters,
            heads=heads, written_out=written_out(config),
        )  # fmt: skip
        if parameters:
            return shape
        counted = shape.matrices + (form.norms * shape.layers + 1) * hidden
        return cls(**{**vars(shape), "parameters": counted})


def config_of(folder: Path) -> dict[str, Any]:
    """The configuration of a model folder.

    Raises:
        OSError, ValueError: there is none.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config


def kind_of(config: Mapping[str, Any]) -> str:
    """The model type that a configuration names, of its language model; "" if it names none."""
    inner = config.get("text_config") or config
    return str(inner.get("model_type") or config.get("model_type") or "")


def written_out(config: Mapping[str, Any]) -> bool:
    """Whether `slmops.train.written` has the forward pass of a configuration."""
    inner = config.get("text_config") or config
    rope = inner.get("rope_parameters") or inner.get("rope_scaling") or {}
    plain = rope.get("rope_type", rope.get("type", "default")) in ("default", "llama3")
    plain = plain and inner.get("hidden_act", "silu") == "silu" and not inner.get("use_sliding_window", False)
    return kind_of(config) in FAST and plain


def ffn_width(architecture: Architecture) -> int:
    """The feed-forward width: as given, or 8/3 of hidden rounded up to a multiple of 32."""
    return architecture.ffn or math.ceil(architecture.hidden * 8 / 3 / 32) * 32


def parameters(architecture: Architecture, vocabulary: int) -> int:
    """The exact number of weights of a decoder from scratch."""
    hidden, head = architecture.hidden, architecture.hidden // architecture.heads
    shared = (architecture.kv_heads or architecture.heads) * head
    layer = 2 * hidden * hidden + 2 * hidden * shared + 3 * hidden * ffn_width(architecture) + 2 * hidden
    if architecture.type == "qwen3":
        layer += 2 * head
    tables = vocabulary * hidden * (1 if architecture.tie_embeddings else 2)
    return tables + architecture.layers * layer + hidden


def lower_bytes(folder: Path) -> int:
    """Bytes of the weights in a folder where they are not float32, so that another copy is made as they are loaded; 0: they are."""
    try:
        entries = list(_entries(folder))
    except (OSError, ValueError, KeyError):
        return 0
    total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries)
    return 0 if all(entry["dtype"] == "F32" for entry in entries) else total


def weights(folder: Path) -> int:
    """Weights in the safetensors files of a folder, from their headers alone; 0 if there are none."""
    return sum(weights_by_type(folder).values())


def weights_by_type(folder: Path) -> Counter[str]:
    """The same, apart by the type that they have in the files: F32, BF16, …"""
    found: Counter[str] = Counter()
    for entry in _entries(folder):
        found[entry["dtype"]] += math.prod(entry["shape"])
    return found


def _entries(folder: Path) -> Iterator[dict[str, Any]]:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > 100_000_000:
                raise ValueError(f"{path.name} is no safetensors file")
            header = json.loads(file.read(size))
        yield from (entry for name, entry in header.items() if name != "__metadata__")
