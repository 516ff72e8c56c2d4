"""Adapters in folders: what a low-rank adapter is made of, and which base it belongs to.

`read` looks at settings and at the shapes in the weights' header; weights themselves are loaded by `Adapter.weights`.
An adapter says by a digest which base it was trained over, and `require_base` refuses any other.

The names of layers are those of the Hugging Face model, such as `model.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.digest import digest_file, digest_json
from slmops.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ADAPTER = "adapter"
"""Folder of the adapter in a trained model's folder: PEFT's files, or adapter.safetensors of a bottleneck."""
BASE = "base.json"
"""Beside the adapter's weights: the digest of the base that they belong to."""
SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def base_digest(folder: Path) -> str:
    """Digest of what an adapter depends on: the base's weights and configuration."""
    names = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "config.json")
    return digest_json({p.name: digest_file(p) for p in names})


def require_base(adapter: Path, base: Path, digest: str = "") -> None:
    """Refuse an adapter that was trained on another base.

    Args:
        digest: of the base, where it is known already.

    Raises:
        ModelError: it was, or it does not say.
    """
    try:
        wanted = json.loads((adapter / BASE).read_text("utf-8"))["digest"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{adapter}: no {BASE} says which base it belongs to", "train it with slmops") from error
    found = digest or base_digest(base)
    if wanted != found:
        raise ModelError(
            f"{adapter}: the adapter belongs to another base ({wanted[7:15]}, this one is {found[7:15]})",
            "use the base that it was trained on, or train the adapter again",
        )


@dataclass(frozen=True)
class Shape:
    """One adapted layer: the numbers of its inputs and outputs, and the rank between them."""

    inputs: int
    rank: int
    outputs: int


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter: a layer's weight W becomes W + scale · B·A.

    Attributes:
        folder: where its files are.
        tuning: lora, rslora, dora or qlora.
        base: digest of the base.
        scale: of the product; alpha / rank, for rslora alpha / √rank.
        layers: adapted layer to its shape, in the order of the names.
        settings: PEFT's own.
    """

    folder: Path
    tuning: str
    base: str
    scale: float
    layers: Mapping[str, Shape]
    settings: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(shape.rank for shape in self.layers.values())

    @property
    def targets(self) -> tuple[str, ...]:
        """Last parts of the layers' names, sorted."""
        return tuple(sorted({name.rpartition(".")[2] for name in self.layers}))

    def weights(self) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Layer to A (rank, inputs) and B (outputs, rank), float32."""
        import numpy as np
        from safetensors.numpy import load_file

        loaded = load_file(self.folder / WEIGHTS)

        def get(name: str, part: str) -> NDArray[np.float32]:
            return np.asarray(loaded[f"{PREFIX}{name}.lora_{part}.weight"], np.float32)

        return {name: (get(name, "A"), get(name, "B")) for name in self.layers}


def read(model: Path) -> Adapter:
    """The low-rank adapter in a trained model's folder, or in the folder of an adapter. No weights are loaded.

    Raises:
        ModelError: there is none, it is of another kind, it has weights that were trained whole, or it does not say which
            base it belongs to.
    """
    from safetensors import SafetensorError, safe_open

    folder = model / ADAPTER if (model / ADAPTER).is_dir() else model
    hint = "train it with train.tuning: lora, rslora or qlora"
    if (folder / "adapter.safetensors").is_file():
        raise ModelError(f"{folder}: the adapter is a bottleneck, which has no low-rank form", hint)
    try:
        settings = json.loads((folder / SETTINGS).read_text("utf-8"))
        about = json.loads((folder / BASE).read_text("utf-8"))
        base, tuning = str(about["digest"]), str(about["tuning"])
        with safe_open(folder / WEIGHTS, "np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        missing = Path(error.filename or "").name or WEIGHTS
        raise ModelError(f"{folder}: no adapter of slmops: {missing} is missing", hint) from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter cannot be read: {error}", hint) from error
    if settings.get("peft_type") != "LORA":
        raise ModelError(f"{folder}: the adapter is of the kind {settings.get('peft_type')}, not LORA", hint)
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"):
        if settings.get(key):
            raise ModelError(f"{folder}: {key} is set in {SETTINGS}, which slmops does not know", hint)
    layers = {}
    for name, (rank, inputs) in sorted((n, s) for n, s in shapes.items() if n.endswith(".lora_A.weight")):
        layer = name.removesuffix(".lora_A.weight")
        layers[layer.removeprefix(PREFIX)] = Shape(inputs, rank, shapes[f"{layer}.lora_B.weight"][0])
    if not layers:
        raise ModelError(f"{folder}: {WEIGHTS} holds no low-rank weights", hint)
    whole = sorted(name.removeprefix(PREFIX) for name in shapes if ".lora_" not in name)
    if whole:
        raise ModelError(
            f"{folder}: {whole[0]} was trained whole, which is no low-rank addition",
            "train it without train.lora.embeddings, or use its merged model",
        )
    rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    return Adapter(folder, "dora" if settings.get("use_dora") else tuning, base, scale, layers, settings)


def read_all(folders: Mapping[str, Path], base: Path, *, plain: str = "") -> dict[str, Adapter]:
    """Several adapters of one base, by name.

    Args:
        folders: name to trained model.
        base: the folder of the base.
        plain: what is to be done; given, dora is refused, because its sums are not of the form W + scale · B·A.

    Raises:
        ModelError: there is no adapter, one cannot be read, is of another base, or is a dora that does not fit.
    """
    if not folders:
        raise ModelError("there is no adapter", "give at least one input named adapter.NAME")
    digest, found = base_digest(base), {}
    for name, folder in sorted(folders.items()):
        adapter = read(folder)
        require_base(adapter.folder, base, digest)
        if plain and adapter.tuning == "dora":
            raise ModelError(
                f"adapter {name}: dora also scales the base's weights, so it {plain}",
                "train it with train.tuning: lora or rslora, or use its merged model",
            )
        found[name] = adapter
    return found
