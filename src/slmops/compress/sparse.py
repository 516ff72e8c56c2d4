"""What the methods that set single weights to zero share: how many, in which layers, and how the model is written.

They look at the linear layers of the decoder's blocks, in the order in which the model computes them, each calibrated on
what the sparse ones before it give; embedding and output matrix stay. The model's shape stays, and so do its files' sizes:
zeros are stored like all else. What they are good for: a file that is compressed on its way, and processors that skip
two zeros of four.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from slmops.core import pruning
from slmops.core.method import Context, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive
from slmops.errors import CompressionError

if TYPE_CHECKING:
    import torch

TAKES = {"model": "model", "data": "dataset", "synthetic?": "dataset", "augmented?": "dataset"}
PACKAGES = ("torch", "transformers", "safetensors")
GROUP, ZEROS = 4, 2
"""The pattern 2:4: so many zeros in each group of inputs that lie next to each other."""

Sparsity = Annotated[float, Field(gt=0, lt=1)] | Literal["2:4"]


class Params(BaseParams):
    """`sparsity`: share of a layer's weights, or `2:4`; what is looked at: `examples` of the files, those with the smallest ids."""

    files: tuple[str, ...]
    examples: Positive = 256
    sparsity: Sparsity = 0.5


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` smallest of each row; of equal ones those further left: bool, as `scores`."""
    import torch

    chosen = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def in_groups(scores: torch.Tensor) -> torch.Tensor:
    """The smallest two of every four columns in each row: bool (rows, columns), columns a multiple of four."""
    return lowest(scores.reshape(scores.shape[0], -1, GROUP), ZEROS).reshape(scores.shape)


def run(
    layer_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context
) -> Facts:  # fmt: skip
    """Write the sparse model folder.

    Args:
        layer_of: a layer's weight (outputs, inputs) and the mean of x x^T over its inputs, to its sparse weight.

    Raises:
        CompressionError: the blocks are not known, a layer does not divide into fours, or a result is no finite number.
        DataError: there is no example to look at.
        ModelError: the model cannot be loaded.
    """
    import torch

    from slmops.compress import folder
    from slmops.compress.calibrate import loss, opened, walk
    from slmops.core.spec import Prune
    from slmops.engines import read_json

    source = inputs["model"]
    config = read_json(source / "config.json")
    refusal = pruning.refusal(config, Prune(sparsity=params.sparsity))
    if refusal:
        raise CompressionError(*refusal)
    made: dict[str, torch.Tensor] = {}
    lost = whole = 0.0
    zeros = 0
    with opened(inputs, params.files, params.examples, ctx) as it, torch.no_grad():
        for name, layer, found in walk(it, ctx, "thinning"):
            weight = layer.weight.data
            if params.sparsity == "2:4" and weight.shape[1] % GROUP:
                hint = "give a share instead"
                raise CompressionError(f"{name} has {weight.shape[1]} inputs, which do not divide into fours", hint)
            thin = layer_of(weight.float(), found)
            if not torch.isfinite(thin).all():
                raise CompressionError(f"thinning {name} gives no finite numbers", "raise the damping")
            whole += loss(weight, torch.zeros_like(thin), found)
            lost += loss(weight, thin, found)
            zeros += int((thin == 0).sum())
            weight.copy_(thin)
            made[f"{name}.weight"] = thin

    def change(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name, made.get(name, tensor)

    _before, after = folder.rewrite(source, out, change)
    folder.complete(source, out, config, after)
    count = sum(weight.numel() for weight in made.values())
    ctx.progress.log(
        f"{zeros:,} of {count:,} weights of the blocks are zero now ({zeros / count:.1%})"
        + (f"; {lost / whole:.1%} of what the layers add is lost on training examples" if whole else "")
    )
    facts: dict[str, Any] = {"zeros": zeros, "weights": count, "parameters": after}
    return facts | {"lost": round(lost / whole, 6) if whole else None}
