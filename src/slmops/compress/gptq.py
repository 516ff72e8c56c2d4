"""Method `compress.gptq`: weights rounded one column after the other, each error made up for by the columns to come.

GPTQ (arXiv 2210.17323), for each linear layer of the decoder's blocks, in the order in which the model computes them, so
that a layer is calibrated on what the rounded layers before it give. The texts are training examples of the project. With
H = mean of x x^T over the inputs x of a layer and U the upper Cholesky factor of (H + damping)^-1, a column w is rounded to
q, and (w - q) / U_ii times row i of U is taken from the columns that are left. Columns go by falling H_ii; a group's scale is
fixed before, as the one of least squared error weighted by H_ii.

The result is a plain model folder whose weights lie on the grid of `compress.grid`, with 4 bits each or those that an earlier
step chose (`widths`). The table of embeddings and the output matrix are left to the converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from slmops.compress import calibrate
from slmops.compress.grid import nearest, scales_of
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive
from slmops.errors import CompressionError

if TYPE_CHECKING:
    import torch

DECLARATION = Declaration(
    name="compress.gptq",
    version="1",
    makes="model",
    takes={"model": "model", "data": "dataset", "synthetic?": "dataset", "augmented?": "dataset", "widths?": "widths"},
    extra="train",
    packages=("torch", "transformers", "safetensors"),
    threads=True,
)

COLUMNS = 128
"""Columns that are rounded before their errors reach the rest of a matrix: only for speed."""


class Params(BaseParams):
    """What to calibrate on: `examples` of the files, as `input/file`, those with the smallest ids."""

    files: tuple[str, ...]
    examples: Positive = 256
    block_size: Literal[16, 32, 64, 128] = 32
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write the model folder with rounded weights.

    Raises:
        CompressionError: the model has other layers than those that are known, or the calibration gives no finite numbers.
        DataError: there is no example to calibrate on.
        ModelError: the model cannot be loaded.
    """
    import torch

    before = after = 0.0
    widths = calibrate.read_widths(inputs)
    with calibrate.opened(inputs, params.files, params.examples, ctx) as it, torch.no_grad():
        ctx.progress.start("rounding", len(it.blocks), "blocks")
        hidden, settings = calibrate.first_inputs(it.model, it.blocks, it.batches)
        for number, block in enumerate(it.blocks):
            for layers in calibrate.staged(block):
                found = calibrate.moments(block, next(iter(layers.values())), hidden, settings[number])
                for name, layer in layers.items():
                    bits = calibrate.width_of(widths, number, name)
                    rounded, plain = round_layer(layer.weight.data, found, params.block_size, params.damping, bits)
                    if not torch.isfinite(rounded).all():
                        raise CompressionError(
                            f"rounding layer {number}.{name} gives no finite numbers", "raise the damping"
                        )
                    before += calibrate.loss(layer.weight.data, plain, found)
                    after += calibrate.loss(layer.weight.data, rounded, found)
                    layer.weight.data.copy_(rounded)
            hidden = [calibrate.call(block, h, kwargs) for h, kwargs in zip(hidden, settings[number], strict=True)]
            ctx.progress.advance()
        ctx.progress.stop()
        calibrate.save(it.model, inputs["model"], out)
        tokens, blocks = it.tokens, len(it.blocks)
    width = "the chosen widths" if widths else "4 bits"
    ctx.progress.log(
        f"rounded to {width} on {tokens:,} tokens of training examples"
        + (f": squared error of the layers' outputs {after / before:.2f} times that of rounding to nearest" if before else "")
    )  # fmt: skip
    return {"tokens": tokens, "error_to_nearest": round(after / before, 6) if before else None, "blocks": blocks}


def upper_factor(found: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of a `hessian` with `damping` added to its diagonal: (inputs, inputs)."""
    import torch

    damped = found.clone()
    damped.diagonal().add_(damping)
    factor: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor


def round_layer(
    weight: torch.Tensor, found: torch.Tensor, block_size: int, damping: float, bits: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix on the grid, once by GPTQ and once by the same scales to nearest.

    Args:
        weight: (outputs, inputs).
        found: `calibrate.moments` of its inputs.
        damping: share of the mean of its diagonal that is added to it.

    Returns:
        float32 (outputs, inputs) both.
    """
    import torch

    work = weight.float().clone()
    diagonal = found.diagonal()
    scale, largest = scales_of(work, diagonal, block_size, bits)
    plain = nearest(work, scale, largest, bits)
    order = diagonal.argsort(descending=True, stable=True)
    upper = upper_factor(found[order][:, order], damping * diagonal.mean().clamp(min=1e-12))
    work, scale, largest = work[:, order], scale[:, order], largest[:, order]
    done = torch.empty_like(work)
    for start in range(0, work.shape[1], COLUMNS):
        end = min(start + COLUMNS, work.shape[1])
        errors = torch.empty(work.shape[0], end - start)
        for i in range(start, end):
            column = work[:, i]
            done[:, i] = nearest(column, scale[:, i], largest[:, i], bits)
            errors[:, i - start] = (column - done[:, i]) / upper[i, i]
            work[:, i:end] -= errors[:, i - start, None] * upper[i, None, i:end]
        work[:, end:] -= errors @ upper[start:end, end:]
    back = torch.empty_like(done)
    back[:, order] = done
    return back, plain
