"""Training on weights rounded as the converter will round them (straight-through estimator, arXiv 1308.3432).

int4: the rounding is the converter's plain rule: in each block of `block_size` weights along the input dimension the first
value m of largest size gives the scale s = float16(m / -8), sign included, and each weight becomes
clip(rint(w / s) + 8, 0, 15) - 8. A block of zeros stays zero. The last block of a row is filled with zeros. A test holds
this file and the converter's to the same numbers.

A quantised table that is both embedding and output matrix is rounded in the same way, blocks along the hidden dimension.
The trained weights stay float32: only the forward pass sees the rounded ones.

ternary (BitNet b1.58, arXiv 2402.17764): the linear layers of the blocks are -s, 0 or s from the first step on, with a scale for each
256 weights of a row, as GGUF's types TQ1_0 and TQ2_0 have it. With a the mean size of a group, weights below a / 2 become zero, as in
BitNet; s = float16(the mean size of the others), where BitNet takes a itself: so rounded weights round to themselves, and a saved
model can be trained on. Embedding and output matrix are not rounded. Inputs of layers are not either, where BitNet rounds them to
int8: llama.cpp does that at run time, by groups of 256, and ONNX Runtime by blocks, both too finely for a training to notice. The
model that is saved holds the rounded weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmops.core.runtimes import TERNARY_GROUP

if TYPE_CHECKING:
    import torch

START = {"int4": 0.6, "ternary": 0.0}
"""Share of the steps before rounding begins."""


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


def fake_ternary(weight: torch.Tensor) -> torch.Tensor:
    """The matrix (rows, inputs) with each group of 256 weights of a row as -s, 0 and s, float32, without gradient.

    Args:
        weight: (rows, inputs), inputs a multiple of 256.
    """
    import torch

    with torch.no_grad():
        grid = weight.detach().float().reshape(weight.shape[0], -1, TERNARY_GROUP)
        size = grid.abs()
        kept = size > 0.5 * size.mean(2, keepdim=True)
        count = kept.sum(2, keepdim=True).clamp_(min=1)
        scale = (size.mul_(kept).sum(2, keepdim=True) / count).half().float()
        return grid.sign().mul_(kept).mul_(scale).add_(0.0).reshape(weight.shape)  # no zero is negative


def fake(weight: torch.Tensor, mode: str, block_size: int) -> torch.Tensor:
    """The matrix as a mode of `train.quantization_aware` has it, float32, without gradient."""
    return fake_ternary(weight) if mode == "ternary" else fake_int4(weight, block_size)
