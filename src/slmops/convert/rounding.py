"""Rounding weights to few bits: the rules that the converter and quantisation-aware training share.

A matrix W (out, in) is cut into groups of `block_size` along its last axis; a last group that is short is padded with
zeros. Each group has a scale s, kept as float16, and codes q of `bits` bits; its value is (q - 2^(bits-1)) * s.

The plain rule takes s = float16(m / -2^(bits-1)), m being the element of largest magnitude (the first on ties), so
that m gets code 0, and q = rint(w / s) + 2^(bits-1), clamped. It is idempotent: rounded weights round to themselves,
bit for bit. `search` tries other scales and keeps one only where it lowers the group's squared error, so weights that
already lie on the grid stay as they are.

Groups of -s, 0 and s (ternary training) are no such grid: -2^(bits-1) codes s or -s, but not both. `ternary` takes them with the
scale s and three codes, exactly, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CANDIDATES = tuple(round(0.70 + 0.02 * i, 2) for i in range(21) if i != 15)
"""Scales that are tried, as shares of the plain rule's."""
AT_ONCE = 1 << 18
"""Weights that are rounded at a time, so that what is computed of them needs little memory, whatever the matrix."""


@dataclass(frozen=True)
class Rounded:
    """A rounded matrix.

    Attributes:
        codes: uint8 (out, groups, block_size), values 0 to 2^bits - 1.
        scales: float16 (out, groups).
        bits: 2, 4 or 8.
        columns: the width before padding.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    bits: int
    columns: int

    def values(self) -> NDArray[np.float32]:
        """What the codes stand for: float32 (out, columns)."""
        import numpy as np

        centred = self.codes.astype(np.float32) - np.float32(1 << (self.bits - 1))
        full: NDArray[np.float32] = centred * self.scales.astype(np.float32)[..., None]
        return np.ascontiguousarray(full.reshape(full.shape[0], -1)[:, : self.columns])

    def packed(self) -> NDArray[np.uint8]:
        """The bytes as the runtime reads them: (out, groups, block_size * bits / 8), the first code in the lowest bits."""
        import numpy as np

        each = 8 // self.bits
        packed: NDArray[np.uint8] = self.codes[..., 0::each].copy()
        for place in range(1, each):
            packed |= self.codes[..., place::each] << np.uint8(self.bits * place)
        return packed


def round_matrix(weights: Any, bits: int, block_size: int, *, search: bool = False) -> Rounded:
    """Round a float32 matrix (out, in).

    Args:
        weights: float32 array (out, in), finite.
        bits: 2, 4 or 8.
        block_size: weights that share a scale.
        search: look for scales with a lower squared error than the plain rule's.
    """
    import numpy as np

    rows, columns = weights.shape
    groups = -(-columns // block_size)
    codes, scales = np.empty((rows, groups, block_size), np.uint8), np.empty((rows, groups), np.float16)
    some = max(1, AT_ONCE // (groups * block_size))
    for start in range(0, rows, some):
        part = _groups(weights[start : start + some], block_size)
        codes[start : start + some], scales[start : start + some] = _round(part, 1 << (bits - 1), search)
    return Rounded(codes, scales, bits, columns)


def _round(groups: NDArray[np.float32], half: int, search: bool) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Codes and scales of groups (out, groups, block); each is rounded by itself.

    A trial goes over arrays (block, groups), in which what belongs to all groups alike lies side by side: the processor does many
    groups at a time.
    """
    import numpy as np

    rows, count, block = groups.shape
    flat = groups.reshape(-1, block)
    largest = flat[np.arange(len(flat)), np.abs(flat).argmax(-1)]
    best = (largest / np.float32(-half)).astype(np.float16)
    if search:
        turned = np.ascontiguousarray(flat.T)
        work = np.empty_like(turned)
        least = _error(turned, best.astype(np.float32), half, work)
        for factor in CANDIDATES:
            scales = (largest * np.float32(factor) / np.float32(-half)).astype(np.float16)
            error = _error(turned, scales.astype(np.float32), half, work)
            better = error < least
            np.copyto(best, scales, where=better)
            np.copyto(least, error, where=better)
    steps = _steps(flat, best.astype(np.float32)[:, None], half, np.empty_like(flat))
    codes: NDArray[np.uint8] = (steps + np.float32(half)).astype(np.uint8)
    return codes.reshape(groups.shape), best.reshape(rows, count)


def ternary(weights: Any, bits: int, block_size: int) -> Rounded | None:
    """The codes of a float32 matrix (out, in) whose every group is -s, 0 and s with s in float16; None for any other.

    Law: `values()` gives the matrix back, bit for bit (-0 as 0).

    Args:
        weights: float32 array (out, in), finite.
        bits: 2, 4 or 8.
        block_size: weights that share a scale.
    """
    import numpy as np

    groups = _groups(weights, block_size)
    largest = np.abs(groups).max(-1)
    if largest.size and largest.max() > np.finfo(np.float16).max:
        return None
    scales = largest.astype(np.float16)
    if (scales != largest).any() or not np.equal(np.abs(groups), largest[..., None]).all(where=groups != 0):
        return None
    return Rounded((np.sign(groups) + (1 << (bits - 1))).astype(np.uint8), scales, bits, weights.shape[1])


def _groups(weights: Any, block_size: int) -> NDArray[np.float32]:
    """A matrix (out, in) as (out, groups, block_size), the last group of a row filled with zeros."""
    import numpy as np

    rows, columns = weights.shape
    padded = np.pad(np.asarray(weights, np.float32), ((0, 0), (0, -columns % block_size)))
    groups: NDArray[np.float32] = padded.reshape(rows, -1, block_size)
    return groups


def _steps(
    groups: NDArray[np.float32], scales: NDArray[np.float32], half: int, out: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The integers of least distance, from -half on, into `out`; 0 where the scale is 0. `scales` are broadcast to `groups`."""
    import numpy as np

    np.divide(groups, np.where(scales == 0, np.float32(np.inf), scales), out=out)
    np.rint(out, out=out)
    return np.clip(out, np.float32(-half), np.float32(half - 1), out=out)


def _error(
    groups: NDArray[np.float32], scales: NDArray[np.float32], half: int, work: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Squared error of each group under its scale, of groups (block, groups). `work` is of their shape."""
    import numpy as np

    _steps(groups, scales, half, work)
    work *= scales
    work -= groups
    np.square(work, out=work)
    if len(work) % 8:  # a whole row is a group
        found: NDArray[np.float32] = work.sum(0)
        return found
    eight = work.reshape(-1, 8, work.shape[1]).sum(0)  # in the order in which numpy adds up a row
    error: NDArray[np.float32] = ((eight[0] + eight[1]) + (eight[2] + eight[3])) + (
        (eight[4] + eight[5]) + (eight[6] + eight[7])
    )
    return error
