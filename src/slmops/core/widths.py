"""How many bits each matrix of a decoder gets: which matrices share a width, its bytes, the best choice under a bound. Pure.

Matrices of a block with the same input are one unit, since runtimes join them: `3.qkv`, `3.o`, `3.gate_up`, `3.down` of block 3,
and `table`: the token embedding with the output matrix. A choice is a width for each unit; a file `widths.json` keeps one as
{unit: bits}.

Law: `choose` finds the least sum of harms of all choices within the bound, not a near one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

FILE = "widths.json"
WIDTHS = (2, 4, 8)
"""Bits that the runtime multiplies with."""
TABLE = "table"
ROLES = {
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"), "o": ("o_proj",), "gate_up": ("gate_proj", "up_proj", "gate_up_proj"),
    "down": ("down_proj",),
}  # fmt: skip
"""Linear layers of a block by unit, in the order in which the block computes them; those of one unit have the same input."""
_ROLE = {name: role for role, names in ROLES.items() for name in names}
_LAYER = re.compile(r"(?:^|[./])layers\.(\d+)[./](?:\w+[./])*?(\w+_proj)(?:[./]|$)")
SCALE_BYTES = 2
GRAPH_BYTES, LAYER_BYTES = 3_000, 3_300
"""More than a graph takes besides its tensors, as a whole and for each block."""


class Option(NamedTuple):
    """What a width costs a unit: bytes in the file, and harm in any unit of which sums make sense."""

    bytes: int
    harm: float


def unit_of(name: str) -> str | None:
    """The unit of a matrix, by its name in Hugging Face's form or in the runtime builder's graph; None: it is in none."""
    if "embed_tokens" in name or "lm_head" in name:
        return TABLE
    found = _LAYER.search(name)
    role = found and _ROLE.get(found[2])
    return f"{found[1]}.{role}" if found and role else None


def matrix_bytes(rows: int, columns: int, bits: int, block_size: int) -> int:
    """Bytes of a rounded matrix (rows, columns): codes, and a float16 scale for each group of `block_size` in a row."""
    return rows * -(-columns // block_size) * (block_size * bits // 8 + SCALE_BYTES)


def rest_bytes(layers: int, other_parameters: int) -> int:
    """More than all else in a model's file takes: the graph, and norms and biases in float32."""
    return GRAPH_BYTES + LAYER_BYTES * layers + 4 * other_parameters


def choose(options: Mapping[str, Mapping[int, Option]], bound: int) -> dict[str, int] | None:
    """The width of each unit with the least sum of harms, of those whose bytes are at most `bound` together.

    A knapsack with one choice for each unit, solved exactly: after each unit the sums that no other beats in both bytes
    and harm are kept. Of equal ones the smaller file wins.

    Returns:
        None where even the smallest widths are larger than the bound.
    """
    states: list[tuple[int, float, tuple[object, ...]]] = [(0, 0.0, ())]
    least = [min(option.bytes for option in widths.values()) for widths in options.values()]
    left = sum(least)
    for smallest, widths in zip(least, options.values(), strict=True):
        left -= smallest
        sums = [
            (size + option.bytes, harm + option.harm, (bits, before))
            for size, harm, before in states
            for bits, option in widths.items()
            if size + option.bytes + left <= bound
        ]
        states, best = [], float("inf")
        for state in sorted(sums, key=lambda s: s[:2]):
            if state[1] < best:
                states.append(state)
                best = state[1]
    if not states:
        return None
    chain = states[-1][2]
    found: list[int] = []
    while chain:
        bits, chain = chain  # type: ignore[assignment]
        found.append(bits)  # type: ignore[arg-type]
    return dict(zip(options, reversed(found), strict=True))
