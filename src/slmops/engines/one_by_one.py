"""Answers one prompt after the other, for engines that hold one context: the loop that they share, and how tokens are picked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from slmops.core.engine import Generation, Sampling
from slmops.engines import check_room

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Steps(Protocol):
    """What an engine of this kind can do."""

    context_length: int
    end_ids: frozenset[int]

    def start(self, length: int) -> None:
        """An empty context with room for `length` tokens."""

    def feed(self, ids: Sequence[int], at: int) -> NDArray[np.float32]:
        """Put ids into the context from position `at`; the logits after the last of them, (vocabulary,)."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens."""


def generate(
    engine: Steps, prompts: Sequence[Sequence[int]], sampling: Sampling, on_done: Callable[[int], None] | None = None
) -> list[Generation]:
    """One answer per prompt; see `slmops.core.engine.Engine`. With sampling, prompt i is seeded with `seed + i`."""
    check_room(prompts, engine.context_length)
    answers = []
    for index, prompt in enumerate(prompts):
        answers.append(_one(engine, prompt, sampling, index))
        if on_done:
            on_done(1)
    return answers


def _one(engine: Steps, prompt: Sequence[int], sampling: Sampling, index: int) -> Generation:
    import numpy as np

    started = time.perf_counter()
    room = min(sampling.max_new_tokens, engine.context_length - len(prompt))
    random = np.random.default_rng(sampling.seed + index) if sampling.temperature else None
    engine.start(len(prompt) + room)
    row = engine.feed(prompt, 0)
    tokens: list[int] = []
    first = 0.0
    while True:
        tokens.append(pick(row, sampling, random))
        first = first or time.perf_counter() - started
        if len(tokens) == room or (tokens[-1] in engine.end_ids and not sampling.ignore_end):
            break
        row = engine.feed(tokens[-1:], len(prompt) + len(tokens) - 1)
    total = time.perf_counter() - started
    return Generation(engine.decode(tokens), tuple(tokens), tokens[-1] in engine.end_ids, first, total)


def pick(row: NDArray[np.float32], sampling: Sampling, random: Any) -> int:
    """Choose a token from its logits (vocabulary,): the most likely one, the lowest id on ties, or by chance."""
    import numpy as np

    if random is None:
        return int(row.argmax())
    scores = row.astype(np.float64) / sampling.temperature
    order = np.argsort(-scores, kind="stable")
    chances = np.exp(scores[order] - scores[order[0]])
    chances /= chances.sum()
    if sampling.top_k:
        chances[sampling.top_k :] = 0.0
    if sampling.top_p < 1.0:
        chances[chances.cumsum() - chances >= sampling.top_p] = 0.0
    heap = chances.cumsum()
    return int(
        order[min(int(np.searchsorted(heap, random.random() * heap[-1], "right")), int((chances > 0).sum()) - 1)]
    )
