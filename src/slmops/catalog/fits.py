"""Whether a model fits a device: weights, the cache of one conversation, and the program around them.

Weights are in 4 bits where a processor runs the model, and in 16 in the memory of a GPU, as they are published and as runtimes there
take them. A rule of thumb for every runtime, stated in `basis`. `slmops needs` counts one runtime more exactly; a measurement on
the device is worth more than either.
"""

from __future__ import annotations

from dataclasses import dataclass

from slmops.core import cache
from slmops.core.parameters import Config, count

MATRIX_BITS = 4.5
"""A weight in 4 bits and its share of a 16-bit scale for each 32."""
TABLE_BITS = 8.5
"""The same in 8 bits: what runtimes give the embedding and the output matrix beside 4-bit layers."""
PROGRAM = 0.2e9
"""Bytes of a runtime's own code and of its working memory for one token."""
GPU_PROGRAM = 1e9
"""The same on a GPU: the driver's context, work space of its libraries, and activations."""
SYSTEM = 0.5e9
"""Bytes that the device's own system takes at rest, at least; `SYSTEM_SHARE` of its memory where that is more. That share of a GPU's
memory stays free too, as vLLM does it: an allocator has to find room for what comes and goes."""
SYSTEM_SHARE = 0.1
CONTEXT = 4096


@dataclass(frozen=True)
class Need:
    """Bytes: of weights, of the cache of one conversation, of the program."""

    weights: float
    cache: float
    program: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.cache + self.program


def need(config: Config, context: int = CONTEXT, gpu: bool = False) -> Need:
    """What a model takes in 4 bits, or in 16 on a GPU, at a context of so many tokens with a 16-bit cache in which every layer keeps
    all of them."""
    weights, kept = count(config), cache.size(config, context, windows=False)
    if gpu:
        return Need(2 * weights.total, kept, GPU_PROGRAM)
    tables = weights.embedding + weights.output
    bytes_ = weights.matrices * MATRIX_BITS / 8 + tables * TABLE_BITS / 8 + weights.vectors * 4
    return Need(bytes_, kept, PROGRAM)


def usable(ram_bytes: float) -> float:
    """What a device's memory leaves for a model."""
    return ram_bytes - max(SYSTEM, SYSTEM_SHARE * ram_bytes)


def basis(title: str, ram_bytes: float, context: int, gpu: bool = False) -> str:
    """How the verdict came about, for people."""
    left = f"{(ram_bytes - usable(ram_bytes)) / 1e9:.2g} GB"
    if gpu:
        return (
            f"counted, not measured: weights in 16 bits, a 16-bit cache of {context:,} tokens, {GPU_PROGRAM / 1e9:g} GB for the program; "
            f"{title} has {ram_bytes / 1e9:.3g} GB, of which {left} stay free"
        )
    return (
        f"counted, not measured: layers in {MATRIX_BITS:g} bits a weight, tables in {TABLE_BITS:g}, a 16-bit cache of {context:,} tokens, "
        f"{PROGRAM / 1e9:g} GB for the program; {title} has {ram_bytes / 1e9:.3g} GB, of which its system takes {left}"
    )
