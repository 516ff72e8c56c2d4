"""Small repositories that pass every check of headers, for tests of `slmops pull`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.hub_stand_in import tensors

PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}).encode()
LARGE = {
    "config.json": CONFIG, "tokenizer.json": b"{}", "LICENSE": b"free", "NOTICE": b"free",
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": PARTS[0], "b": PARTS[1]}}).encode(),
    PARTS[0]: tensors(b"0", 50_000, "a"), PARTS[1]: tensors(b"1", 30_001, "b"),
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder but its record."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".slmops-pull.json"
    }
