"""The grid that converters round to, in torch: which scale a group of weights gets, and the nearest values under it.

In each group of `block_size` inputs the weight of largest size, the first on ties, is exactly -2^(bits-1) times the scale, a
float16. A converter that rounds by that rule, or by any that does not move weights already on its grid, finds the same
integers and scales again, in ONNX as in GGUF's Q4_0 (4 bits, groups of 32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHRINK = tuple(round(1 - 0.02 * i, 2) for i in range(16))
"""Scales that are tried, as shares of the one at which the largest weight of a group is exact."""


def lowest(bits: int) -> int:
    """The least integer, which the largest weight of a group gets."""
    return -(1 << (bits - 1))


def scales_of(
    weight: torch.Tensor, importance: torch.Tensor, block_size: int, bits: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """A scale for each group, as float16 would keep it, and where the weight that fixes it is.

    The scale is the one of least squared error weighted by `importance`, of those in `SHRINK`.

    Args:
        weight: float32 (outputs, inputs).
        importance: float32 (inputs,), weights of the squared errors.

    Returns:
        float32 (outputs, inputs) scale of each weight, and bool (outputs, inputs): the largest weight of each group.
    """
    import torch

    rows, inputs = weight.shape
    padding = -inputs % block_size
    groups = torch.nn.functional.pad(weight, (0, padding)).reshape(rows, -1, block_size)
    weights = torch.nn.functional.pad(importance, (0, padding)).reshape(1, -1, block_size)
    place = groups.abs().argmax(2, keepdim=True)
    exact = groups.gather(2, place) / lowest(bits)
    best, least = exact.half().float(), torch.full_like(exact, float("inf"))
    for share in SHRINK:
        scale = (exact * share).half().float()
        error = ((_steps(groups, scale, bits) * scale - groups).square() * weights).sum(2, keepdim=True)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    largest = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, place, True)
    wide = best.expand(-1, -1, block_size)
    return wide.reshape(rows, -1)[:, :inputs].contiguous(), largest.reshape(rows, -1)[:, :inputs].contiguous()


def _steps(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The integer of least distance; 0 where the scale is 0."""
    import torch

    found = torch.where(scale == 0, torch.zeros_like(weight), weight / scale)
    return found.round_().clamp_(lowest(bits), -lowest(bits) - 1)


def nearest(weight: torch.Tensor, scale: torch.Tensor, largest: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Each weight's nearest value under scales that are given; the largest of a group gets the lowest. All of one shape."""
    import torch

    return torch.where(largest, lowest(bits), _steps(weight, scale, bits)) * scale


def rounded(weight: torch.Tensor, importance: torch.Tensor, block_size: int, bits: int = 4) -> torch.Tensor:
    """A matrix (outputs, inputs) on the grid, each weight alone, under the scales of `scales_of`."""
    work = weight.float()
    return nearest(work, *scales_of(work, importance, block_size, bits), bits)
