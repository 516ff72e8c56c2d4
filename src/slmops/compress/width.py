"""Method `compress.width`: a model with fewer feed-forward neurons and attention heads in each block.

A neuron is an input of its block's `down_proj`; heads that share keys and values are a group of inputs of `o_proj`, and go
together, so that attention stays regular and a head keeps its size. The importance of a unit g is the mean square of what it
adds to the output, tr(W_g H_g W_g^T), with W_g its columns and H_g its part of the mean of x x^T over the tokens of
training examples of the project: activations as in Minitron (arXiv 2407.14679), weighed by what the next matrix makes of
them. In each block the units of largest importance stay, as many as in every other.

The columns that stay are then fitted so that the outputs are as near as they can be to those before, which is the least squares
solution W_K + W_R H_RK (H_KK + damping)^-1 (optimal brain surgeon for groups; K stays, R goes). Blocks come in the order in
which the model computes them, each measured on what the narrower ones before it give. A unit that adds nothing goes first,
and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from slmops.core import pruning
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import LessThanAll, Positive, Prune
from slmops.errors import CompressionError

if TYPE_CHECKING:
    import torch

DECLARATION = Declaration(
    name="compress.width",
    version="1",
    makes="model",
    takes={"model": "model", "data": "dataset", "synthetic?": "dataset", "augmented?": "dataset"},
    extra="train",
    packages=("torch", "transformers", "safetensors"),
    threads=True,
)

PART = re.compile(r"^model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.(weight|bias)$")


class Params(BaseParams):
    """Shares of neurons and heads that go; what is looked at: `examples` of the files, as `input/file`, those with the smallest ids."""

    files: tuple[str, ...]
    examples: Positive = 256
    ffn: LessThanAll = 0.0
    heads: LessThanAll = 0.0
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01


@dataclass(frozen=True)
class Kept:
    """What stays of a matrix: its inputs, int64 in rising order; and the weights fitted to them, (outputs, inputs that stay)."""

    inputs: torch.Tensor
    fitted: torch.Tensor


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write the narrower model folder.

    Raises:
        CompressionError: nothing or all would go, the blocks are not known, or the calibration gives no finite numbers.
        DataError: there is no example to look at.
        ModelError: the model cannot be loaded.
    """
    import torch

    from slmops.compress import folder
    from slmops.compress.calibrate import loss, opened, walk
    from slmops.engines import read_json

    source = inputs["model"]
    config = read_json(source / "config.json")
    refusal = pruning.refusal(config, Prune(ffn=params.ffn, heads=params.heads))
    if refusal:
        raise CompressionError(*refusal)
    widths = pruning.widths(config)
    assert isinstance(widths, pruning.Widths)
    ffn = pruning.ffn_left(widths.ffn, params.ffn) if params.ffn else widths.ffn
    groups = pruning.groups_left(widths.kv_heads, params.heads) if params.heads else widths.kv_heads
    stages = {"o_proj": (widths.shared_by * widths.head, groups), "down_proj": (1, ffn)}
    kept: dict[str, Kept] = {}
    lost = whole = 0.0
    with opened(inputs, params.files, params.examples, ctx) as it, torch.no_grad():
        for name, layer, found in walk(it, ctx, "measuring", tuple((stage,) for stage in stages)):
            size, count = stages[name.rpartition(".")[2]]
            one = narrowed(layer.weight.data, found, size, count, params.damping)
            if not torch.isfinite(one.fitted).all():
                raise CompressionError(f"fitting {name} gives no finite numbers", "raise the damping")
            kept[f"{name}.weight"] = one
            now = torch.zeros_like(layer.weight.data)
            now[:, one.inputs] = one.fitted
            whole += loss(layer.weight.data, torch.zeros_like(now), found)
            lost += loss(layer.weight.data, now, found)
            layer.weight.data.copy_(now)

    def change(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name, part(name, tensor, widths, kept)

    before, after = folder.rewrite(source, out, change)
    folder.complete(source, out, pruning.narrower(config, ffn, groups), after)
    ctx.progress.log(
        f"{ffn} of {widths.ffn} neurons and {groups * widths.shared_by} of {widths.heads} heads kept in each block: "
        f"{after / 1e6:.2f} M parameters instead of {before / 1e6:.2f} M"
        + (f"; {lost / whole:.1%} of what the blocks add is lost on training examples" if whole else "")
    )
    return {
        "ffn": ffn, "heads": groups * widths.shared_by, "kv_heads": groups, "parameters": after, "parameters_before": before,
        "lost": round(lost / whole, 6) if whole else None,
    }  # fmt: skip


def importance(weight: torch.Tensor, found: torch.Tensor, size: int) -> torch.Tensor:
    """Mean square of what each unit adds to a layer's output, summed over the outputs.

    Args:
        weight: (outputs, inputs).
        found: mean of x x^T over its inputs.
        size: inputs of a unit, next to each other.

    Returns:
        (inputs / size,) float32.
    """
    units = weight.shape[1] // size
    if size == 1:
        return weight.float().square().sum(0) * found.diagonal()
    columns = weight.float().reshape(weight.shape[0], units, size).permute(1, 0, 2)
    own = found.reshape(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return ((columns @ own) * columns).sum((1, 2))


def narrowed(weight: torch.Tensor, found: torch.Tensor, size: int, count: int, damping: float) -> Kept:
    """The `count` units of largest importance, and the weights fitted to them.

    Args:
        damping: share of the mean of the diagonal of `found` that is added to it.
    """
    import torch

    units = weight.shape[1] // size
    if count == units:
        return Kept(torch.arange(weight.shape[1]), weight.float().clone())
    order = importance(weight, found, size).argsort(descending=True, stable=True)
    places = torch.arange(weight.shape[1]).reshape(units, size)
    stay = places[order[:count].sort().values].flatten()
    go = places[order[count:].sort().values].flatten()
    inside = found[stay][:, stay].clone()
    inside.diagonal().add_(damping * found.diagonal().mean().clamp(min=1e-12))
    moved = torch.cholesky_solve(found[stay][:, go] @ weight[:, go].float().T, torch.linalg.cholesky(inside)).T
    return Kept(stay, weight[:, stay].float() + moved)


def part(name: str, tensor: torch.Tensor, widths: pruning.Widths, kept: Mapping[str, Kept]) -> torch.Tensor:
    """What stays of a tensor of the model."""
    import torch

    found = PART.match(name)
    if found is None:
        return tensor
    number, layer, kind = found.groups()
    if layer in ("o_proj", "down_proj"):
        return kept[name].fitted if kind == "weight" else tensor
    heads = kept[f"model.layers.{number}.self_attn.o_proj.weight"].inputs
    groups = heads[:: widths.shared_by * widths.head] // (widths.shared_by * widths.head)
    shared = (groups[:, None] * widths.head + torch.arange(widths.head)).flatten()
    neurons = kept[f"model.layers.{number}.mlp.down_proj.weight"].inputs
    rows: dict[str, Any] = {
        "q_proj": heads, "k_proj": shared, "v_proj": shared, "gate_proj": neurons, "up_proj": neurons,
        "qkv_proj": _behind(widths.head, (heads, widths.heads), (shared, widths.kv_heads), (shared, widths.kv_heads)),
        "gate_up_proj": _behind(1, (neurons, widths.ffn), (neurons, widths.ffn)),
    }  # fmt: skip
    return tensor[rows[layer]] if layer in rows else tensor


def _behind(size: int, *pieces: tuple[torch.Tensor, int]) -> torch.Tensor:
    """Rows of matrices that lie behind each other in one; each piece: rows that stay, and how many units of `size` there are."""
    import torch

    rows, start = [], 0
    for stay, units in pieces:
        rows.append(stay + start)
        start += units * size
    return torch.cat(rows)
