"""What a model needs to answer: bytes of weights, cache, activations and program, by runtime, and of the file on the disk.

The peak of a process that answers prompts which fill the context, in a runtime as slmops opens it, on one machine's processor.
What can be counted follows from the configuration: weights by the formats' own bits, the cache of every layer. What cannot, is
measured: each runtime's program, what it keeps for an entry of the vocabulary, how often it copies weights and what it keeps for a
token of a prompt are constants below, taken from small models of real architectures with random weights on Linux, x86-64.
`benchmarks/needs.py` measures again and compares, other models included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from slmops.core import cache
from slmops.core.parameters import Config, Weights, count, head_width, kind_of, language, lfm2_width

Runtime = Literal["onnx_genai", "llama_cpp", "openvino", "torch"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
CHUNK = 512
"""Tokens that llama.cpp puts through the model at once."""
LLAMA_ENTRY, GENAI_ENTRY, OPENVINO_ENTRY, TORCH_ENTRY = 312, 360, 350, 960
"""Bytes that a runtime keeps for an entry of the vocabulary and its merge."""
GGUF_ENTRY = 50
"""Bytes of the same in a GGUF file."""
GRAPH = 2e6
"""Bytes of an OpenVINO graph without its weights."""


BITS: dict[Runtime, dict[str, float]] = {
    "onnx_genai": {"int4": 4.5, "fp32": 32},
    "llama_cpp": {"q4_0": 4.5, "q8_0": 8.5, "fp16": 16},
    "openvino": {"int4": 4.5, "int8": 8, "fp32": 32},
    "torch": {"fp32": 32},
}
"""Of a weight in a matrix, its share of scales included, in the forms whose memory was measured."""


@dataclass(frozen=True)
class Needs:
    """Bytes. `disk`: of the model's file, tokenizer apart; `program`: of the runtime with its tables of the vocabulary."""

    runtime: Runtime
    form: str
    disk: float
    weights: float
    cache: float
    activations: float
    program: float

    @property
    def total(self) -> float:
        """The peak of the process."""
        return self.weights + self.cache + self.activations + self.program


def needs(config: Config, runtime: Runtime, form: str, context: int, batch: int = 1) -> Needs:
    """What it takes to answer `batch` prompts that fill `context` tokens each, with their answers.

    Raises:
        KeyError: the architecture is not known, or `form` is not one of the runtime's.
    """
    c, weights, bits = language(config), count(config), BITS[runtime][form]
    count_of = {"onnx_genai": _onnx_genai, "llama_cpp": _llama_cpp, "openvino": _openvino, "torch": _torch}[runtime]
    return count_of(c, weights, form, bits, context, batch)


def _wide(c: Config) -> int:
    """The feed-forward width that a token meets."""
    if kind_of(c) == "lfm2":
        return lfm2_width(c)
    shared = int(c.get("shared_intermediate_size") or 0)
    taken = int(c.get("num_experts_per_tok") or 0) if c.get("num_local_experts") else 0
    return shared + taken * int(c["intermediate_size"]) if shared or taken else int(c["intermediate_size"])


def _llama_cpp(c: Config, w: Weights, form: str, bits: float, context: int, batch: int) -> Needs:
    """The file is mapped; of q4_0, matrices of the blocks are arranged anew beside it. The output matrix has six or eight bits there."""
    hidden, vocabulary = int(c["hidden_size"]), int(c["vocab_size"])
    head = bits if form != "q4_0" else 6.5625 if hidden % 256 == 0 else 8.5
    tables = w.embedding * (bits if w.output else head) + w.output * head
    blocks = w.matrices * bits / 8
    disk = blocks + tables / 8 + w.vectors * 4 + GGUF_ENTRY * vocabulary
    at_once = min(context, CHUNK)
    return Needs(
        "llama_cpp", form, disk, disk + (blocks if form == "q4_0" else 0), cache.size(c, context, batch, windows=False),
        at_once * 4 * (2 * _wide(c) + 3 * hidden) + 6e6, 49e6 + LLAMA_ENTRY * vocabulary,
    )  # fmt: skip


def _onnx_genai(c: Config, w: Weights, form: str, bits: float, context: int, batch: int) -> Needs:
    """Matrices are copied as they are prepared, the output matrix more often than others; a cache in float32, and a prompt in one piece."""
    hidden = int(c["hidden_size"])
    head = (w.output or w.embedding) * bits / 8
    blocks = w.matrices * bits / 8
    disk = blocks + (w.embedding + w.output) * bits / 8 + w.vectors * 4
    copies, heads = (1.53, 3.47) if form == "int4" else (1.0, 2.1)
    loaded = blocks * copies + head * heads + (w.embedding * bits / 8 if w.output else 0)
    kept = cache.size(c, context, batch, bytes_=4, windows=False)
    moved = context * batch * 4 * (5 * _wide(c) + 8 * hidden)
    tables = GENAI_ENTRY * int(c["vocab_size"])
    work = max(
        moved, head - kept - tables
    )  # another copy of the output matrix, before there are a tokenizer and a cache
    return Needs("onnx_genai", form, disk, loaded, kept, work, 62.6e6 + tables)


def _openvino(c: Config, w: Weights, form: str, bits: float, context: int, batch: int) -> Needs:
    """The file is mapped, and matrices are copied as they are prepared: of int4 with scale and offset of each group in float32. The cache
    is in 8 bits with a scale and an offset for each head, but in float32 for that form."""
    disk = (w.matrices + w.embedding + w.output) * bits / 8 + w.vectors * 4 + GRAPH
    prepared = (w.matrices + (w.output or w.embedding)) * {"int4": 6, "int8": 8, "fp32": 32}[form] / 8
    if form == "fp32":
        prepared += w.embedding * 4
    kept = cache.size(c, context, batch, bytes_=4 if form == "fp32" else 1 + 8 / head_width(c), windows=False)
    moved = context * batch * 4 * 10 * (_wide(c) + int(c["hidden_size"]))
    return Needs("openvino", form, disk, disk + prepared, kept, moved, 130e6 + OPENVINO_ENTRY * int(c["vocab_size"]))


def _torch(c: Config, w: Weights, form: str, bits: float, context: int, batch: int) -> Needs:
    """Loaded from a file in bfloat16, which is mapped until all is converted."""
    disk = w.total * 2
    kept = cache.size(c, context, batch, bytes_=4, windows=False)
    moved = context * batch * 4 * (4 * _wide(c) + 8 * int(c["hidden_size"]))
    return Needs(
        "torch", form, disk, w.total * 4, kept, max(moved, disk - kept), 400e6 + TORCH_ENTRY * int(c["vocab_size"])
    )
