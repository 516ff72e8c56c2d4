"""Engines of the server: a decoder with rows, each of which holds one prompt and its answer.

Unlike `slmops.core.engine.Engine`, which answers a list of prompts, such an engine takes single steps, so that answers can
join and leave at any of them. One adapter a runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Rows(Protocol):
    """A loaded model with a fixed number of rows.

    Law: the logits of a row depend on its own tokens and on how they were fed, bit for bit, never on other rows.
    """

    rows: int
    context_length: int
    vocabulary: int
    end_ids: frozenset[int]

    def length(self, row: int) -> int:
        """How many tokens a row holds."""

    def cut(self, row: int, length: int) -> None:
        """Forget the tokens of a row after its first `length`."""

    def feed(self, row: int, ids: Sequence[int]) -> NDArray[np.float32]:
        """Add tokens to a row; the logits after the last of them, (vocabulary,)."""

    def decode(self, tokens: Mapping[int, int]) -> dict[int, NDArray[np.float32]]:
        """Add one token to each of these rows in one pass; the logits of each, (vocabulary,), valid until the next call."""

    def move(self, source: int, target: int) -> None:
        """Copy what a row holds into another; the source is empty then."""

    def close(self) -> None:
        """Free the model."""
