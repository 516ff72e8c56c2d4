"""Method `compress.wanda`: weights that count little become zero, the others stay as they are.

Wanda (arXiv 2306.11695): the score of a weight is its size times the norm of the input that it multiplies, over training
examples of the project; in each row (the weights of one output) those of smallest score go, or two of every four.
See `compress.sparse` for which layers, and in which order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from slmops.compress import sparse
from slmops.core.method import Context, Declaration, Facts

if TYPE_CHECKING:
    import torch

DECLARATION = Declaration(
    name="compress.wanda",
    version="1",
    makes="model",
    takes=sparse.TAKES,
    extra="train",
    packages=sparse.PACKAGES,
    threads=True,
)

Params = sparse.Params


def run(params: sparse.Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write the sparse model folder. Raises as `compress.sparse.run`."""
    return sparse.run(lambda weight, found: thin(weight, found, params.sparsity), params, inputs, out, ctx)


def thin(weight: torch.Tensor, found: torch.Tensor, sparsity: sparse.Sparsity) -> torch.Tensor:
    """The matrix with zeros.

    Args:
        weight: float32 (outputs, inputs).
        found: mean of x x^T over its inputs.
    """
    scores = weight.abs() * found.diagonal().clamp(min=0).sqrt()
    if sparsity == "2:4":
        return weight.masked_fill(sparse.in_groups(scores), 0.0)
    return weight.masked_fill(sparse.lowest(scores, round(sparsity * weight.shape[1])), 0.0)
