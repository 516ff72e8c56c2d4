"""The forms of a student that `convert.also` can ask for: FORMAT-KIND, such as `gguf-q4_0`, and what each format needs.

One table: a new format is one entry here, a method that writes it, and an engine that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slmops.core import runtimes
from slmops.core.runtimes import Named, Refusal

Gguf = Literal[
    "gguf-fp32", "gguf-fp16", "gguf-bf16", "gguf-q8_0", "gguf-q6_k", "gguf-q5_k_m", "gguf-q4_k_m", "gguf-q4_0", "gguf-iq4_nl",
    "gguf-iq4_xs", "gguf-q3_k_m", "gguf-q2_k", "gguf-tq2_0", "gguf-tq1_0",
]  # fmt: skip
Mlx = Literal["mlx-fp32", "mlx-fp16", "mlx-bf16", "mlx-int8", "mlx-int4"]
OpenVino = Literal["openvino-fp32", "openvino-fp16", "openvino-int8", "openvino-int4"]
LiteRt = Literal["litert-fp32", "litert-int8", "litert-int4"]
Executorch = Literal["executorch-fp32", "executorch-int8", "executorch-int4"]
Safetensors = Literal["safetensors-bf16", "safetensors-fp16"]
Form = Literal[Gguf, Mlx, OpenVino, LiteRt, Executorch, Safetensors]


@dataclass(frozen=True)
class Format:
    """What a format is made and judged with.

    Attributes:
        name: what people call it.
        title: what people call the runtime that judges it.
        reported: what the report calls that runtime.
        method: writes it.
        runtime: the engine that judges it.
        extra: the pip extra of the runtime.
        packages: distributions whose versions can change what the runtime computes, beside those that every run has.
        refuse: whether a model with this config.json cannot be written so.
        adapters: the method that writes a base with adapters that can be switched; "": none.
        measured: whether the engine that judges it is what will serve it, so that its speed and memory say something.
    """

    name: str
    title: str
    reported: Literal["torch", "llama.cpp", "mlx", "openvino", "litert", "executorch"]
    method: str
    runtime: Named
    extra: str
    packages: tuple[str, ...]
    refuse: Callable[[Mapping[str, Any]], Refusal | None]
    adapters: str = ""
    measured: bool = True


FORMATS: Mapping[str, Format] = {
    "gguf": Format(
        "GGUF", "llama.cpp", "llama.cpp", "convert.gguf", "llama_cpp", "llamacpp", ("llama-cpp-python", "gguf"), runtimes.llama_cpp,
        adapters="convert.gguf_lora",
    ),
    "mlx": Format("MLX", "MLX", "mlx", "convert.mlx", "mlx", "mlx", ("mlx", "mlx-lm", "tokenizers"), runtimes.mlx),
    "openvino": Format(
        "OpenVINO", "OpenVINO", "openvino", "convert.openvino", "openvino", "openvino", ("openvino", "tokenizers"), runtimes.openvino
    ),
    "litert": Format("LiteRT", "LiteRT", "litert", "convert.litert", "litert", "litert", ("ai-edge-litert", "tokenizers"), runtimes.litert),
    "executorch": Format(
        "ExecuTorch", "ExecuTorch", "executorch", "convert.executorch", "executorch", "executorch",
        ("executorch", "torch", "tokenizers"), runtimes.executorch,
    ),
    "safetensors": Format(
        "safetensors", "PyTorch", "torch", "convert.safetensors", "torch", "train", (), runtimes.safetensors, measured=False
    ),
}  # fmt: skip


def split(form: str) -> tuple[str, str]:
    """Format and kind of a form: `gguf-q4_0` is (`gguf`, `q4_0`)."""
    name, _, kind = form.partition("-")
    return name, kind


def of(form: str) -> Format | None:
    """The format of a form (`gguf-q4_0`), None if it is not one of these."""
    return FORMATS.get(split(form)[0])


def packages(runtimes: Iterable[str]) -> dict[str, str]:
    """The packages of these runtimes, beside those that every run has, each with the pip extra that brings it."""
    wanted = set(runtimes)
    return {p: format.extra for format in FORMATS.values() if format.runtime in wanted for p in format.packages}
