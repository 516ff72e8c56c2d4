"""Training on weights rounded as the converter will round them (straight-through estimator, arXiv 1308.3432).

The rounding is the converter's plain rule: in each block of `block_size` weights along the input dimension the first
value m of largest size gives the scale s = float16(m / -8), sign included, and each weight becomes
clip(rint(w / s) + 8, 0, 15) - 8. A block of zeros stays zero. The last block of a row is filled with zeros. A test holds
this file and the converter's to the same numbers.

A quantised table that is both embedding and output matrix is rounded in the same way, blocks along the hidden dimension.
The trained weights stay float32: only the forward pass sees the rounded ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

START = 0.6  # share of the steps before rounding begins


def int4_blocks(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and scales of a matrix.

    Args:
        weight: (rows, inputs) float32.
        block_size: weights that share a scale, along `inputs`.

    Returns:
        (rows, blocks, block_size) float32 integers in -8..7, and (rows, blocks, 1) float32 scales.
    """
    import torch

    rows, inputs = weight.shape
    blocks = -(-inputs // block_size)
    if blocks * block_size != inputs:
        weight = torch.nn.functional.pad(weight, (0, blocks * block_size - inputs))
    grid = weight.reshape(rows, blocks, block_size)
    largest = grid.gather(2, grid.abs().argmax(2, keepdim=True))
    scale = (largest / -8.0).half().float()
    steps = torch.where(scale == 0, torch.zeros_like(grid), grid / scale)
    return steps.round_().add_(8.0).clamp_(0, 15).sub_(8), scale


def fake_int4(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """The matrix (rows, inputs) as it will be read back after int4 quantisation, float32, without gradient."""
    import torch

    with torch.no_grad():
        integers, scale = int4_blocks(weight.detach().float(), block_size)
        return integers.mul_(scale).reshape(weight.shape[0], -1)[:, : weight.shape[1]].contiguous()
