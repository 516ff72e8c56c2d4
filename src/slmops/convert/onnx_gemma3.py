"""What the model builder of ONNX Runtime GenAI (0.18) does not get right for Gemma 3, put right around it.

- transformers 5 keeps rotary settings per type of layer; the builder reads the older flat form (`flatten`).
- The builder rounds the factor of the embedding, the root of the width, to two decimals, and stretches the positions of
  local layers by the factor that is meant for global ones alone. `correct` writes what the model itself computes.

Attention windows, norms and everything else of the builder's graph are as in PyTorch (a test compares them).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slmops.errors import ConversionError

ARCHITECTURE = "Gemma3ForCausalLM"
TABLES = {"global": "full_attention", "local": "sliding_attention"}
"""What the builder calls its tables of cosines and sines, and the type of layer that reads them."""


def flatten(config: Any) -> None:
    """Give a `Gemma3TextConfig` the attributes that the builder reads, in place."""
    rope = config.rope_parameters
    config.rope_local_base_freq = rope[TABLES["local"]]["rope_theta"]
    config.rope_parameters = dict(rope[TABLES["global"]])


def correct(model: Any, source: Path) -> None:
    """Put the numbers of the model in `source` into the builder's graph (an `onnx.ModelProto`), in place.

    Raises:
        ConversionError: the graph is not as this version of the builder makes it.
    """
    import numpy as np
    from onnx import numpy_helper
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(source), local_files_only=True)
    tensors = {t.name: t for t in model.graph.initializer}
    places = {node.name: node for node in model.graph.node}
    scale = places.get("/model/embed_tokens/Mul")
    if scale is None or not all(f"{part}_cache_{name}" in tensors for name in TABLES for part in ("cos", "sin")):
        raise ConversionError(
            "the graph of Gemma 3 is not as expected", "install the onnxruntime-genai that slmops asks for"
        )
    root = np.array(config.hidden_size**0.5, np.float32)
    model.graph.initializer.append(numpy_helper.from_array(root, "embedding/scale"))
    scale.input[1] = "embedding/scale"
    for name, kind in TABLES.items():
        rope = config.rope_parameters[kind]
        factor = float(rope.get("factor", 1.0)) if rope["rope_type"] == "linear" else 1.0
        angles = _angles(config.max_position_embeddings, config.head_dim, float(rope["rope_theta"]), factor)
        for part, table in (("cos", angles.cos()), ("sin", angles.sin())):
            full = f"{part}_cache_{name}"
            tensors[full].CopyFrom(numpy_helper.from_array(table.numpy(), full))


def _angles(positions: int, size: int, theta: float, factor: float) -> Any:
    """(positions, size / 2) float32, computed in the steps of transformers.

    Args:
        factor: by how much positions are stretched.
    """
    import torch

    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    return torch.outer(torch.arange(positions).float(), frequencies / factor)
