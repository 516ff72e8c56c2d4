"""Method `compress.sparsegpt`: weights become zero one column after the other, each error made up for by the columns to come.

SparseGPT (arXiv 2301.00774), with the machinery of `compress.gptq`: with H = mean of x x^T over the inputs x of a layer and U the
upper Cholesky factor of (H + damping)^-1, a weight w of column i costs w^2 / U_ii^2. The cheapest of a block of 128 columns
go, or two of every four in a row; what that does to the layer's outputs is then taken out of the columns that are left, as
GPTQ does it with the error of rounding. See `compress.sparse` for which layers, and in which order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from slmops.compress import sparse
from slmops.core.method import Context, Declaration, Facts

if TYPE_CHECKING:
    import torch

DECLARATION = Declaration(
    name="compress.sparsegpt",
    version="1",
    makes="model",
    takes=sparse.TAKES,
    extra="train",
    packages=sparse.PACKAGES,
    threads=True,
)

COLUMNS = 128
"""Columns among which the weights of smallest cost are chosen."""


class Params(sparse.Params):
    """`damping`: share of the mean of H's diagonal that is added to it."""

    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write the sparse model folder. Raises as `compress.sparse.run`."""
    return sparse.run(
        lambda weight, found: thin(weight, found, params.sparsity, params.damping), params, inputs, out, ctx
    )


def thin(weight: torch.Tensor, found: torch.Tensor, sparsity: sparse.Sparsity, damping: float) -> torch.Tensor:
    """The matrix with zeros.

    Args:
        weight: float32 (outputs, inputs).
        found: mean of x x^T over its inputs.
        damping: share of the mean of its diagonal that is added to it.
    """
    import torch

    from slmops.compress.gptq import upper_factor

    upper = upper_factor(found, damping * found.diagonal().mean().clamp(min=1e-12))
    work, cost = weight.clone(), upper.diagonal().square()
    for start in range(0, work.shape[1], COLUMNS):
        end = min(start + COLUMNS, work.shape[1])
        gone = torch.zeros(work.shape[0], end - start, dtype=torch.bool)
        if sparsity != "2:4":
            scores = (work[:, start:end].square() / cost[start:end]).flatten()
            gone = sparse.lowest(scores, round(sparsity * scores.numel())).reshape(gone.shape)
        errors = torch.empty(work.shape[0], end - start)
        for i in range(start, end):
            if sparsity == "2:4" and i % sparse.GROUP == 0:
                group = slice(i, i + sparse.GROUP)
                gone[:, i - start : i - start + sparse.GROUP] = sparse.in_groups(work[:, group].square() / cost[group])
            error = torch.where(gone[:, i - start], work[:, i], 0.0) / upper[i, i]
            errors[:, i - start] = error
            work[:, i:end] -= error[:, None] * upper[i, None, i:end]
            work[:, i].masked_fill_(gone[:, i - start], 0.0)
        work[:, end:] -= errors @ upper[start:end, end:]
    return work
