"""Which prompt and which answer goes on when: the loop between requests and an engine's rows.

In each `step` one chunk of one prompt is read, and then all answers that have begun get their next token in one pass. So a long prompt
does not hold up the answers beside it, and a request joins or leaves at any step. What a row still holds of an
earlier prompt is used again where the new one begins alike.

Law: an answer's tokens depend on its request alone, bit for bit, never on which others were there (held by a property test). For that,
prompts are always cut at the same places, multiples of `CHUNK`, and only whole chunks are used again.

No thread, no clock, no IO: the caller takes steps and times them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from slmops.errors import ModelError, ResourceError
from slmops.serve.sampling import Picked, Picker, Picking

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from slmops.serve.engines import Rows

CHUNK = 128
"""Tokens of a prompt that are read in one step."""
Finish = Literal["stop", "length"]
Allow = Callable[[Sequence[int]], "NDArray[np.bool_] | None"]
"""Which tokens may come after those of an answer, (vocabulary,); None: all."""


class RequestError(ModelError):
    """What was asked cannot be done by this model: the client has to ask for something else."""


def check_length(prompt: Sequence[int], context: int) -> None:
    """Refuse a prompt that is empty or leaves no room for an answer in a context of so many tokens.

    Raises:
        RequestError: it does.
    """
    if not 0 < len(prompt) < context:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens, but the context holds {context}, answer included",
            "shorten the prompt, or serve a model with a longer context",
        )


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Attributes:
        id: unique among those that are there.
        prompt: token ids.
        most: new tokens at most; fewer where the context ends.
        how: how they are picked.
        ignore_end: goes on after an end token.
        allow: what a grammar allows.
    """

    id: int
    prompt: tuple[int, ...]
    most: int
    how: Picking = field(default_factory=Picking)
    ignore_end: bool = False
    allow: Allow | None = None


@dataclass(frozen=True)
class Progress:
    """A request got a token. `finish`: it was the last one, as the end token came or there is no room; `cached`: tokens of the
    prompt that had not to be read, told with the first token."""

    id: int
    picked: Picked
    finish: Finish | None = None
    cached: int = 0


@dataclass
class _Busy:
    """A request that has a row. `last` is the token that goes into the row next; None while the prompt is read."""

    request: Request
    picker: Picker
    room: int
    cached: int
    tokens: list[int] = field(default_factory=list)
    last: int | None = None


class Scheduler:
    """Requests over the rows of an engine. Not safe for use by two threads at once.

    Args:
        engine: see `Rows`; nobody else uses it.
        queue: requests that may wait for a row.
        chunk: see `CHUNK`.
    """

    def __init__(self, engine: Rows, *, queue: int = 256, chunk: int = CHUNK) -> None:
        self._engine, self._most, self._chunk = engine, queue, chunk
        self._waiting: deque[Request] = deque()
        self._busy: dict[int, _Busy] = {}
        self._held: list[tuple[int, ...]] = [()] * engine.rows
        """Of each row the prompt's tokens that it holds in whole chunks."""

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    @property
    def busy(self) -> int:
        """Requests with a row."""
        return len(self._busy)

    def submit(self, request: Request) -> None:
        """Take a request, to be answered in steps to come.

        Raises:
            RequestError: the prompt is empty or leaves no room for an answer, or none is wanted.
            ResourceError: too many wait.
        """
        check_length(request.prompt, self._engine.context_length)
        if request.most < 1:
            raise RequestError("no token may be written", "ask for at least one")
        if len(self._waiting) >= self._most + self._engine.rows - len(self._busy):
            raise ResourceError(f"{len(self._waiting)} requests are waiting already", "try again later")
        self._waiting.append(request)

    def cancel(self, id: int) -> bool:
        """Forget a request; its row is free at once. False if it is not there (any more)."""
        for request in self._waiting:
            if request.id == id:
                self._waiting.remove(request)
                return True
        for row, busy in self._busy.items():
            if busy.request.id == id:
                self._free(row)
                return True
        return False

    def step(self) -> list[Progress]:
        """Read one chunk of the oldest prompt that is not read, and give every answer that has begun its next token.

        Raises:
            ModelError: the engine failed; what it held is lost.
        """
        self._admit()
        found = []
        reading = [row for row, busy in self._busy.items() if busy.last is None]
        if reading:  # in the order in which they came
            found += self._read(reading[0])
        fresh = {row for row in reading[:1] if row in self._busy and self._busy[row].last is not None}
        going = {row: busy.last for row, busy in self._busy.items() if busy.last is not None and row not in fresh}
        if going:
            logits = self._engine.decode({row: last for row, last in going.items() if last is not None})
            for row in sorted(logits):
                found.append(self._token(row, logits[row]))
        self._gather()
        return found

    def _admit(self) -> None:
        while self._waiting and len(self._busy) < self._engine.rows:
            request = self._waiting.popleft()
            row, shared = self._choose(request.prompt)
            self._engine.cut(row, shared)
            self._held[row] = request.prompt[:shared]
            room = min(request.most, self._engine.context_length - len(request.prompt))
            self._busy[row] = _Busy(request, Picker(request.how, request.prompt, request.id), room, shared)

    def _choose(self, prompt: tuple[int, ...]) -> tuple[int, int]:
        """A free row, and how many tokens of it the prompt begins with: that which spares most reading; among equals the one that
        holds least, then the lowest, so that few idle rows lie below busy ones."""
        best: tuple[int, int, int] | None = None
        for row in range(self._engine.rows):
            if row not in self._busy:
                shared = self._shared(self._held[row], prompt)
                key = (-shared, 0 if shared else len(self._held[row]), row)
                best = min(best, key) if best else key
        assert best is not None
        return best[2], -best[0]

    def _shared(self, held: tuple[int, ...], prompt: tuple[int, ...]) -> int:
        """Tokens of whole chunks that both begin with, at least one of the prompt's left to read."""
        most = min(len(held), len(prompt) - 1) // self._chunk * self._chunk
        shared = 0
        while shared < most and held[shared : shared + self._chunk] == prompt[shared : shared + self._chunk]:
            shared += self._chunk
        return shared

    def _read(self, row: int) -> list[Progress]:
        busy = self._busy[row]
        prompt, begin = busy.request.prompt, self._engine.length(row)
        end = min(begin + self._chunk, len(prompt))
        logits = self._engine.feed(row, prompt[begin:end])
        if (end - begin) == self._chunk:
            self._held[row] = prompt[:end]
        return [self._token(row, logits)] if end == len(prompt) else []

    def _token(self, row: int, logits: NDArray[np.float32]) -> Progress:
        busy = self._busy[row]
        request = busy.request
        picked = busy.picker.pick(logits, request.allow(busy.tokens) if request.allow else None)
        cached = busy.cached if not busy.tokens else 0
        busy.tokens.append(picked.token)
        busy.last = picked.token
        finish: Finish | None = None
        if picked.token in self._engine.end_ids and not request.ignore_end:
            finish = "stop"
        elif len(busy.tokens) == busy.room:
            finish = "length"
        if finish:
            self._free(row)
        return Progress(request.id, picked, finish, cached)

    def _free(self, row: int) -> None:
        """The row keeps the whole chunks of its prompt for the next one that begins alike."""
        del self._busy[row]
        self._engine.cut(row, len(self._held[row]))

    def _gather(self) -> None:
        """Move the last answer down while more than half of the rows up to it are idle: they are computed in vain."""
        while self._busy:
            last = max(self._busy)
            if len(self._busy) * 2 > last + 1 or self._busy[last].last is None:
                return
            target = min(row for row in range(last) if row not in self._busy)
            self._engine.move(last, target)
            self._held[target], self._held[last] = self._held[last], ()
            self._busy = {target if row == last else row: busy for row, busy in self._busy.items()}
