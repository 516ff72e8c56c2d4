"""An engine without a model: answers come from a function. For tests, examples and dry runs.

Tokens are the UTF-8 bytes of a text plus `END`; a prompt is rendered as `role: content` lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from slmops.core.engine import Generation, Sampling
from slmops.engines import no_room

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

END = 256
VOCABULARY = 257


class MemoryEngine:
    """Answers each prompt text with `answer(text, sampling)`. Deterministic if the function is."""

    name = "memory"

    def __init__(self, answer: Callable[[str, Sampling], str], context_length: int = 4096) -> None:
        self._answer = answer
        self.context_length = context_length

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Bytes of the messages as lines, and of the start of an answer."""
        lines = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        return list(f"{lines}assistant: ".encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes; `END` is left out."""
        return bytes(i for i in ids if i < END).decode("utf-8", "replace")

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[Generation]:
        """One answer per prompt, cut to `max_new_tokens` bytes."""
        answers = []
        for index, prompt in enumerate(prompts):
            room = min(sampling.max_new_tokens, self.context_length - len(prompt))
            if room < 1:
                raise no_room(index, len(prompt), self.context_length)
            tokens = (*self._answer(self.decode(prompt), sampling).encode(), END)[:room]
            answers.append(Generation(self.decode(tokens), tokens, tokens[-1] == END, logprob=0.0))
            if on_done:
                on_done(1)
        return answers

    def logits(self, ids: Sequence[int], start: int = 0) -> NDArray[np.float32]:
        """Logits that favour the byte that comes next in `ids`, and `END` after the last."""
        import numpy as np

        rows = np.zeros((len(ids) - start, VOCABULARY), np.float32)
        rows[np.arange(len(rows)), [*ids[start + 1 :], END]] = 10.0
        return rows

    def close(self) -> None:
        """Nothing to free."""
