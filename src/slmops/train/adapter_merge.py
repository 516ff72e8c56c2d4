"""Method `train.adapter_merge`: several adapters of one base become one model.

Each adapter changes a weight W by its delta D = scale · B·A (dora: by what its merged weight differs from W). Sums are
of deltas, never of A and B apart: a sum of the As times a sum of the Bs has products of one adapter's A with another's B.

linear: W + Σ wᵢ Dᵢ (task arithmetic, arXiv 2212.04089).
ties: W + the trimmed deltas, of which only those count that have the elected sign, averaged (arXiv 2306.01708). Trimming
is per matrix, as in PEFT and mergekit; the paper ranks all matrices of a model together.
stack: the same sum as linear, kept exact at low rank: ranks are laid side by side, so the result is an adapter too.

Law: with adapters of lora, rslora or qlora, linear and stack give the same weights up to float32 rounding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from slmops.core.method import Context, Declaration, Facts, named_inputs
from slmops.core.method import Params as Base
from slmops.errors import ModelError
from slmops.store import lora

if TYPE_CHECKING:
    import torch

DECLARATION = Declaration(
    name="train.adapter_merge",
    version="1",
    makes="model",
    takes={"base": "model", "adapter*": "model"},
    extra="train",
    packages=("torch", "transformers", "safetensors", "peft"),
)


class Params(Base):
    """How adapters are joined.

    Attributes:
        weights: of adapters by name; 1 where unset.
        density: for ties, the share of each delta that is kept.
    """

    method: Literal["linear", "ties", "stack"] = "linear"
    weights: dict[str, float] = Field(default_factory=dict)
    density: Annotated[float, Field(gt=0, le=1)] = 0.2


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write the merged model, and for stack its adapter in the folder `adapter` as a training would.

    Raises:
        ModelError: adapters of different bases or different layers, a dora in a stack, a weight of no adapter.
    """
    base = inputs["base"]
    folders = named_inputs(inputs, "adapter")
    adapters = lora.read_all(folders, base, plain="cannot be stacked" if params.method == "stack" else "")
    check(params, adapters)
    scales = {name: params.weights.get(name, 1.0) for name in adapters}

    import torch

    from slmops.train import network

    model = network.load(base)
    parts = {name: _parts(adapter) for name, adapter in adapters.items()}
    layers = next(iter(adapters.values())).layers
    ctx.progress.start(f"merging ({params.method})", len(layers), "layers")
    moved = 0
    with torch.no_grad():
        for layer in layers:
            weight = _weight(model, layer, base)
            deltas = [delta(parts[name], layer, adapters[name].scale, weight) for name in adapters]
            change = combine(params, deltas, list(scales.values()))
            moved += int(change.count_nonzero())
            weight += change
            ctx.progress.advance()
    ctx.progress.stop()
    network.save(model, base, out)
    facts: Facts = {"adapters": len(adapters), "method": params.method, "changed_weights": moved}
    if params.method == "stack":
        facts["rank"] = _write_stack(adapters, parts, scales, out / lora.ADAPTER)
    return facts


def check(params: Params, adapters: Mapping[str, lora.Adapter]) -> None:
    """Refuse adapters that do not go together, before weights are loaded.

    Raises:
        ModelError: see `run`.
    """
    unknown = sorted(set(params.weights) - set(adapters))
    if unknown:
        raise ModelError(
            f"weights names {', '.join(unknown)}, which is no adapter", f"there are: {', '.join(adapters)}"
        )
    (first, one), *others = adapters.items()
    for name, other in others:
        ends = [{layer: (s.inputs, s.outputs) for layer, s in a.layers.items()} for a in (one, other)]
        if ends[0] != ends[1]:
            odd = sorted(set(ends[0].items()) ^ set(ends[1].items()))[0][0]
            raise ModelError(
                f"adapters {first} and {name} adapt different layers: {odd} is in one of them "
                f"({', '.join(one.targets)}; {', '.join(other.targets)})",
                "train them with the same train.lora.targets",
            )


def _parts(adapter: lora.Adapter) -> dict[str, torch.Tensor]:
    """`layer.A` (rank, inputs), `layer.B` (outputs, rank) and for dora `layer.m` (outputs,), float32."""
    from safetensors.torch import load_file

    loaded = load_file(adapter.folder / lora.WEIGHTS)
    ends = {".lora_A.weight": ".A", ".lora_B.weight": ".B", ".lora_magnitude_vector": ".m"}
    found = {}
    for name, tensor in loaded.items():
        for end, short in ends.items():
            if name.endswith(end):
                found[name.removeprefix(lora.PREFIX).removesuffix(end) + short] = tensor.float()
    return found


def _weight(model: Any, layer: str, base: Path) -> torch.Tensor:
    try:
        weight: torch.Tensor = model.get_submodule(layer).weight
    except AttributeError as error:
        raise ModelError(f"{base}: the model has no layer {layer}", "the adapter is of another base") from error
    return weight


def delta(parts: Mapping[str, torch.Tensor], layer: str, scale: float, weight: torch.Tensor) -> torch.Tensor:
    """What an adapter adds to a weight (outputs, inputs)."""
    import torch

    added = scale * (parts[f"{layer}.B"] @ parts[f"{layer}.A"])
    magnitude = parts.get(f"{layer}.m")
    if magnitude is None:
        return added
    whole = weight + added
    length: torch.Tensor = torch.linalg.norm(whole, dim=1)
    return whole * (magnitude / length)[:, None] - weight


def combine(params: Params, deltas: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """One change out of several deltas of the same shape."""
    import warnings

    import torch

    if params.method == "ties":
        from peft.utils.merge_utils import ties

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that a density of 1 trims nothing
            merged: torch.Tensor = ties(deltas, torch.tensor(weights), params.density)
        return merged
    change = torch.zeros_like(deltas[0])
    for factor, one in zip(weights, deltas, strict=True):
        change += factor * one
    return change


def _write_stack(
    adapters: Mapping[str, lora.Adapter], parts: Mapping[str, Mapping[str, torch.Tensor]], weights: Mapping[str, float],
    folder: Path,
) -> int:  # fmt: skip
    """Write PEFT's files of the adapter whose ranks are those of all adapters side by side; returns its rank.

    PEFT's own `cat` keeps the first adapter's use_rslora beside alpha = rank, which scales the result by √rank.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    one = next(iter(adapters.values()))
    tensors = {}
    for layer in one.layers:
        a = torch.cat([parts[name][f"{layer}.A"] for name in adapters])
        b = torch.cat([parts[name][f"{layer}.B"] * (weights[name] * adapters[name].scale) for name in adapters], 1)
        tensors[f"{lora.PREFIX}{layer}.lora_A.weight"] = a.contiguous()
        tensors[f"{lora.PREFIX}{layer}.lora_B.weight"] = b.contiguous()
    rank = sum(adapter.rank for adapter in adapters.values())
    save_file(tensors, folder / lora.WEIGHTS, metadata={"format": "pt"})
    settings = {**one.settings, "r": rank, "lora_alpha": rank, "use_rslora": False, "lora_dropout": 0.0}
    (folder / lora.SETTINGS).write_text(json.dumps(settings, sort_keys=True, indent=1) + "\n", "utf-8")
    about = {"digest": one.base, "tuning": "lora"}
    (folder / lora.BASE).write_text(json.dumps(about, sort_keys=True) + "\n", "utf-8")
    return rank
