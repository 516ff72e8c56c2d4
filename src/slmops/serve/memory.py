"""The memory of a served model: what its process will take at most, told before it is started, and what may be taken at all.

Counted are the weights, those of adapters, the keys and values of all rows when they are full, and what a pass works with, from the
graph's own facts. How often the runtime copies weights while it loads them, and its program, are measured: constants below, from models
with random weights (`docs/guides/serve.md` has predictions beside measurements). Law: a reservation is at least the peak of the process.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from slmops.catalog import needs
from slmops.core import cache as core_cache
from slmops.engines import find_gguf, gguf_parts, read_json
from slmops.engines.gguf_tokenizer import tokenizer_place
from slmops.errors import ModelError
from slmops.serve import gguf_facts, graph_facts
from slmops.serve.adapters import adapter_sizes
from slmops.serve.engines import Kind, kind_of
from slmops.train import available

if TYPE_CHECKING:
    from slmops.serve.model import Settings

PROGRAM = 75_000_000
"""Of an interpreter with ONNX Runtime and no model."""
COPIES, FEW_COPIES, HALF_COPIES = (1.0, 3.05), (1.6, 3.55), (3.0, 7.0)
"""How often a matrix and the output matrix are held while they are loaded: in float32, in 8 bits or fewer, and in 16, which are computed
in 32 and were not measured."""
CHUNK = 128
"""Tokens of a prompt in one pass."""
WIDE = 32
"""Numbers for a token and a pass, for each of the hidden width's."""
LLAMA_PLAIN = (0, 1, 7, 32)
"""`general.file_type` of float32, float16, 8 bits and bfloat16: matrices that x86 takes as they lie in the file."""
LLAMA_COPIES, LLAMA_PROGRAM, LLAMA_ENTRY, LLAMA_PAD, LLAMA_ROOM = 2.0, 70_000_000, 400, 256, 512
"""Of llama.cpp: its file, and matrices that are arranged anew beside it; its program; bytes of an entry of the vocabulary; tokens that the
room of a row is rounded up to, and those that it has at first. From `slmops.catalog.needs`, rounded up."""
LLAMA_EMBED = 64
"""Tokens that are read at once for an embedding, each with its logits."""
ADAPTER_COPIES: dict[Kind, int] = {"onnx": 1, "llama_cpp": 1, "torch": 3}
"""How often an adapter's files are held; torch keeps what may be 16 bits in float32, beside the file."""
TORCH_PROGRAM = 450_000_000
SHARE = 0.8
"""Of the memory that is free when the server starts, so much may be taken where nothing else is said."""


@dataclass(frozen=True)
class Reservation:
    """Bytes. `weights`: with the copies that are held while they are loaded; `cache`: keys and values; `work`: of a pass."""

    weights: int
    cache: int
    work: int
    program: int

    @property
    def total(self) -> int:
        """The most that the process takes."""
        return self.weights + self.cache + self.work + self.program


def reservation(settings: Settings) -> Reservation:
    """What is kept for a model's process before it is started.

    Raises:
        ModelError: the folder is not a model.
    """
    folder, rows, context = settings.folder, settings.rows, settings.context
    kind = kind_of(folder, settings.engine)
    worn = adapter_sizes(folder, kind, settings.adapters)
    if kind == "onnx":
        found = _onnx(folder, max(rows, 2) if worn else rows, context)  # the runtime gives adapters two rows at least
    elif kind == "torch":
        found = _torch(folder, rows, context)
    else:
        file = folder if folder.is_file() else find_gguf(folder) or folder / "model.gguf"
        found = _gguf(gguf_parts(file), rows, context, bare=tokenizer_place(folder).is_file())
    return replace(found, weights=found.weights + ADAPTER_COPIES[kind] * sum(worn))


def _onnx(folder: Path, rows: int, context: int | None) -> Reservation:
    try:
        settings = read_json(folder / "genai_config.json")["model"]
        decoder = settings["decoder"]
        whole, head = int(settings["context_length"]), int(decoder["head_size"])
        vocabulary, hidden = int(settings["vocab_size"]), int(decoder["hidden_size"])
        graph = graph_facts.read(folder / decoder["filename"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}/genai_config.json cannot be used: {error}", "convert the model again") from error
    kept = min(context or whole, whole)
    caches = [one for one in graph.inputs if one.name.startswith("past_key_values.") and len(one.shape) == 4]
    cache = sum(rows * one.shape[1] * kept * head * one.item for one in caches)
    tables = [one.bytes for one in graph.weights if vocabulary in one.shape]
    table, all_ = max(tables, default=0), sum(one.bytes for one in graph.weights)
    few_bits = any(len(one.shape) > 1 and one.item == 1 for one in graph.weights)
    halves = not few_bits and any(len(one.shape) > 1 and one.item == 2 for one in graph.weights)
    copies, table_copies = HALF_COPIES if halves else FEW_COPIES if few_bits else COPIES
    last_only = any(one.name == "logits" and len(one.shape) == 3 and one.shape[1] == 1 for one in graph.outputs)
    logits = 4 * vocabulary * (2 * rows + 16 + (0 if last_only else CHUNK))
    return Reservation(
        int(copies * (all_ - table) + table_copies * table), cache, logits + 4 * CHUNK * WIDE * hidden, PROGRAM
    )


def _gguf(files: list[Path], rows: int, context: int | None, bare: bool) -> Reservation:
    about, size = gguf_facts.read(files[0]), sum(file.stat().st_size for file in files)
    kind = about.get("general.architecture", "")

    def number(key: str, otherwise: float) -> int:
        return int(about.get(f"{kind}.{key}", otherwise))

    hidden, heads = number("embedding_length", 0), max(1, number("attention.head_count", 1))
    wide = number("attention.key_length", hidden / heads) + number("attention.value_length", hidden / heads)
    whole, vocabulary = number("context_length", 2048), int(about.get("tokenizer.ggml.tokens#", 0))
    full = -(-(min(context or whole, whole) + 1) // LLAMA_PAD) * LLAMA_PAD
    item = 4 if about.get("general.file_type") == 0 else 2
    row = full * number("block_count", 0) * number("attention.head_count_kv", heads) * wide * item
    before = LLAMA_ROOM  # the cache grows by doubling, and what it held is kept beside meanwhile
    while 2 * before < full:
        before *= 2
    carried = int(rows * row * before / full) if before < full else 0
    each = 4 * (2 * number("feed_forward_length", 4 * hidden) + WIDE * hidden)
    work = CHUNK * each + 4 * vocabulary * (rows + CHUNK)
    embedder = row + LLAMA_EMBED * (each + 4 * vocabulary)  # a context of its own, with one row
    plain = about.get("general.file_type") in LLAMA_PLAIN and platform.machine() in ("x86_64", "AMD64")
    copies = 1.05 if plain else LLAMA_COPIES
    entries = LLAMA_ENTRY * vocabulary * (2 if bare else 1)  # grammars read the file's own vocabulary once more
    return Reservation(int(copies * size), rows * row, carried + work + embedder, LLAMA_PROGRAM + entries)


def _torch(folder: Path, rows: int, context: int | None) -> Reservation:
    config, size = read_json(folder / "config.json"), sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    try:
        whole = int(config.get("max_position_embeddings") or 2048)
        kept = min(context or whole, whole)
        found = needs.needs(config, "torch", "fp32", CHUNK)
        kept_bytes = core_cache.size(config, kept, rows, bytes_=4, windows=False)
        vocabulary = int(config["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}/config.json cannot be used: {error}", "give a model that slmops knows") from error
    weights = max(found.weights + size, 2.0 * size)  # the file is mapped until all is converted
    work = found.activations + 4 * vocabulary * (2 * rows + CHUNK)
    return Reservation(int(weights), int(2 * kept_bytes), int(work), TORCH_PROGRAM + needs.TORCH_ENTRY * vocabulary)


def budget() -> int | None:
    """What may be taken of the memory that is free now, that of the control group included; None: nobody knows."""
    free = available.available()
    return None if free is None else int(SHARE * free)


def free() -> int | None:
    """Bytes that may be taken before something is killed or swapped; None: nobody knows."""
    return available.available()


def resident(pid: int | None) -> int:
    """Bytes that a process holds; 0 where the system does not say."""
    return _status(pid, "VmRSS")


def peak(pid: int | None) -> int:
    """The most that a process has held; 0 where the system does not say."""
    return _status(pid, "VmHWM")


def _status(pid: int | None, key: str) -> int:
    if pid is None:
        return 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0
