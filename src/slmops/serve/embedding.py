"""Embeddings beside answers: one part of one prompt is read between two steps of the answers, in the order in which they were asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from slmops.errors import ResourceError
from slmops.serve.scheduler import RequestError, check_adapter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from slmops.serve.engines import Rows


class Embeddings:
    """Prompts whose mean hidden states are wanted.

    Args:
        queue: requests that may be there.
    """

    def __init__(self, engine: Rows, *, queue: int = 256) -> None:
        self._engine, self._most = engine, queue
        self._waiting: deque[tuple[int, list[list[int]], str | None]] = deque()
        self._done = 0
        self._now: Iterator[NDArray[np.float32] | None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, asked: dict[str, Any]) -> None:
        """Take a request `{id, prompts, adapter}`.

        Raises:
            RequestError: a prompt is empty or longer than the context, or the model has no such adapter.
            ResourceError: too many wait.
        """
        prompts: list[list[int]] = asked["prompts"]
        adapter: str | None = asked.get("adapter")
        check_adapter(adapter, self._engine.adapters)
        context = self._engine.context_length
        odd = next((prompt for prompt in prompts if not 0 < len(prompt) <= context), None)
        if odd is not None:
            raise RequestError(f"a text has {len(odd)} tokens, but the context holds {context}", "give shorter texts")
        if len(self._waiting) >= self._most:
            raise ResourceError(f"{len(self._waiting)} requests are waiting already", "try again later")
        if prompts:
            self._waiting.append((asked["id"], prompts, adapter))

    def cancel(self, id: int) -> None:
        """Forget a request, if it is there."""
        first = bool(self._waiting) and self._waiting[0][0] == id
        self._waiting = deque(one for one in self._waiting if one[0] != id)
        if first:
            self._done, self._now = 0, None

    def step(self) -> dict[str, Any] | None:
        """Read one part; `{"embedded": [id, which prompt, vector]}` when a prompt is done.

        Raises:
            ModelError: the engine failed.
        """
        if not self._waiting:
            return None
        id, prompts, adapter = self._waiting[0]
        try:
            self._now = self._now or self._engine.embed(prompts[self._done], adapter)
            vector = next(self._now)
        except RequestError as error:
            self.cancel(id)
            return {"refused": id, "why": error.message, "hint": error.hint, "busy": False, "asked": True}
        if vector is None:
            return None
        which, self._now = self._done, None
        self._done += 1
        if self._done == len(prompts):
            self._waiting.popleft()
            self._done = 0
        return {"embedded": [id, which, [round(float(value), 8) for value in vector]]}
