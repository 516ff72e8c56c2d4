"""A model folder written anew with other weights: tensor by tensor, in the files and number formats that it had."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.errors import ModelError
from slmops.store.files import read_json

if TYPE_CHECKING:
    import torch

Change = Callable[[str, "torch.Tensor"], "tuple[str, torch.Tensor] | None"]
"""A tensor of the old folder, by name, to its name and values in the new one; None leaves it out."""


def rewrite(source: Path, out: Path, change: Change) -> tuple[int, int]:
    """Write the weights of `source` into `out`, each as `change` gives it back.

    Returns:
        Weights before and after.

    Raises:
        ModelError: there are no weights.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    before, after, size = 0, 0, 0
    places: dict[str, str] = {}
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{source} holds no safetensors file", "convert the weights first")
    for path in files:
        tensors = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                tensor = file.get_tensor(name)
                before += tensor.numel()
                changed = change(name, tensor)
                if changed is None:
                    continue
                after += changed[1].numel()
                size += changed[1].numel() * tensor.element_size()
                tensors[changed[0]] = changed[1].to(tensor.dtype).contiguous()
                places[changed[0]] = path.name
            meta = file.metadata()
        if tensors:
            save_file(tensors, out / path.name, meta or {"format": "pt"})
            (out / path.name).chmod(0o644)
    index = read_json(source / "model.safetensors.index.json")
    if isinstance(index, dict):
        index.setdefault("metadata", {})["total_size"] = size
        index["weight_map"] = dict(sorted(places.items()))
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return before, after


def record(source: Path, out: Path, parameters: int) -> None:
    """The record of the training, if there is one, with the weights that there are now."""
    found = read_json(source / "training.json")
    if isinstance(found, dict):
        (out / "training.json").write_text(
            json.dumps(found | {"parameters": parameters}, indent=2) + "\n", encoding="utf-8"
        )


def complete(source: Path, out: Path, config: Mapping[str, Any], parameters: int) -> None:
    """Write config.json and copy what else a model folder has: tokenizer, generation settings, the training's record."""
    import shutil

    from slmops.engines.tokenizer import TOKENIZER_FILES

    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    record(source, out, parameters)
