"""What the base's GGUF and its adapters' must agree on: names of tensors, and the order of rows in llama's attention.

In GGUF, llama's query and key rows stand in another order than in Hugging Face (the two halves of a rotary pair side by
side); other architectures keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from slmops.core import runtimes
from slmops.errors import ConversionError, MissingExtraError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]


def library() -> Any:
    """The `gguf` package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error
    return gguf


def supported(config: Mapping[str, Any]) -> None:
    """Check a model's config.json before any work.

    Raises:
        ConversionError: the architecture, or something about it, cannot be written as GGUF.
    """
    refusal = runtimes.llama_cpp(config)
    if refusal:
        raise ConversionError(*refusal)


def architecture(config: Mapping[str, Any]) -> str:
    """What llama.cpp calls the model's architecture."""
    gguf = library()
    return str(gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[runtimes.LLAMA_CPP[config["model_type"]]]])


def namer(config: Mapping[str, Any]) -> Callable[[str], str | None]:
    """From a layer's name in Hugging Face to that in GGUF, None if it has none there."""
    gguf = library()
    kind = gguf.MODEL_ARCH[runtimes.LLAMA_CPP[config["model_type"]]]
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])

    def name(layer: str) -> str | None:
        found: str | None = names.get_name(layer)
        return found

    return name


def rows(values: Array, layer: str, config: Mapping[str, Any]) -> Array:
    """The outputs of a layer (outputs, …) in the order that GGUF has them in."""
    heads = config["num_attention_heads"]
    of = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}
    last = layer.rpartition(".")[2]
    return permute(values, of[last]) if config["model_type"] == "llama" and last in of else values


def permute(values: Array, heads: int) -> Array:
    """Rows (outputs, …) of llama's query or key projection in the order of GGUF."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
