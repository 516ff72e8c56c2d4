"""Method `evaluate.predict_llama_cpp`: `evaluate.predict` in llama.cpp, whose version counts in the key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from slmops.core.engine import KvCache
from slmops.core.method import Context, Declaration, Facts
from slmops.evaluate import predict

DECLARATION = Declaration(
    name="evaluate.predict_llama_cpp",
    version=predict.DECLARATION.version,
    makes="predictions",
    takes=predict.DECLARATION.takes,
    extra="llamacpp",
    packages=("llama-cpp-python", "gguf"),
)


class Params(predict.Params):
    """As those of `evaluate.predict`; `kv_cache`: how keys and values are held."""

    runtime: Literal["llama_cpp"] = "llama_cpp"
    kv_cache: KvCache | None = None


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """See `evaluate.predict`."""
    return predict.run(params, inputs, out, ctx)
