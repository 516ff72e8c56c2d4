"""Answers to several prompts at once, for engines that keep a row of keys and values for each: the loop that they share, and its rules.

For measuring what decoding together brings (`slmops bench --batch`), so the rules are those of a measurement: prompts of one length, the
most likely token each time, end tokens passed over, every answer of the same number of tokens. Rows never wait for each other then, and
nothing is padded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from slmops.core.engine import Generation
from slmops.engines import AT_ONCE, check_room, no_room
from slmops.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Words(Protocol):
    """What turns rows of tokens into answers."""

    end_ids: frozenset[int]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens."""


class Rows(Words, Protocol):
    """What an engine of this kind can do."""

    name: str
    context_length: int

    def start_rows(self, rows: int, length: int) -> None:
        """Empty contexts for `rows` answers, each with room for `length` tokens."""

    def feed_rows(self, ids: Sequence[Sequence[int]], at: int) -> NDArray[np.float32]:
        """Put ids (rows, tokens) into the contexts from position `at`; the logits after the last of each row, (rows, vocabulary)."""


def check(prompts: Sequence[Sequence[int]], new_tokens: int, context: int, most: int | None = None) -> None:
    """Refuse, before any work, what cannot be answered at once.

    Raises:
        ModelError: there is no prompt or more than `most`, prompts differ in length, or they leave no room for `new_tokens` tokens.
    """
    if most is not None and len(prompts) > most:
        raise ModelError(f"the runtime takes at most {most} prompts at once, not {len(prompts)}", "give fewer at once")
    if not prompts or new_tokens < 1:
        raise ModelError("there is nothing to answer at once", "give at least one prompt and one new token")
    check_room(prompts, context)
    for index, prompt in enumerate(prompts):
        if len(prompt) != len(prompts[0]):
            raise ModelError(
                f"prompt {index} has {len(prompt)} tokens and prompt 0 has {len(prompts[0])}: at once, all have the same number",
                "give prompts of one length, or answer them one after the other",
            )
    if len(prompts[0]) + new_tokens > context:
        raise no_room(0, len(prompts[0]) + new_tokens, context, new_tokens)


def generate(engine: Rows, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Generation]:
    """One answer of `new_tokens` tokens to each prompt; see `slmops.core.engine.AtOnce`."""
    import numpy as np

    check(prompts, new_tokens, engine.context_length, AT_ONCE[engine.name])
    length = len(prompts[0])
    started = time.perf_counter()
    engine.start_rows(len(prompts), length + new_tokens)
    steps = [engine.feed_rows(prompts, 0).argmax(-1)]
    first = time.perf_counter() - started
    while len(steps) < new_tokens:
        steps.append(engine.feed_rows(steps[-1][:, None].tolist(), length + len(steps) - 1).argmax(-1))
    total = time.perf_counter() - started
    return answers(engine, np.stack(steps, 1).tolist(), first, total)


def answers(engine: Words, rows: Sequence[Sequence[int]], first: float, total: float) -> list[Generation]:
    """The answers of rows of tokens, with the seconds that all of them took."""
    return [Generation(engine.decode(row), tuple(row), row[-1] in engine.end_ids, first, total) for row in rows]
