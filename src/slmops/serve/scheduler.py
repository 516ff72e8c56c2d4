"""Which prompt and which answer goes on when: the loop between requests and an engine's rows.

In each `step` a chunk of one prompt is read, or several short prompts that have no more tokens together, and then all answers that
have begun get their next token in one pass. So prompts do not hold up the answers beside them for long, and a request joins or
leaves at any step. What a row still holds of an
earlier prompt is used again where the new one begins alike.

Law: an answer's tokens depend on its request alone, bit for bit, never on which others were there (held by a property test). For that,
prompts are always cut at the same places, multiples of `CHUNK`, and only whole chunks are used again.

No thread, no clock, no IO: the caller takes steps and times them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from slmops.errors import ModelError, ResourceError
from slmops.serve.sampling import Picked, Picker, Picking, pick

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from slmops.serve.engines import Rows

CHUNK = 128
"""Tokens of a prompt that are read in one step."""
Finish = Literal["stop", "length", "failed"]


class RequestError(ModelError):
    """What was asked cannot be done by this model: the client has to ask for something else."""


class GrammarError(RequestError):
    """What an answer shall look like cannot be read, or cannot be held to."""


class Limited(Protocol):
    """What one answer may say, token by token; see `slmops.serve.grammar.Limit`. A request needs one of its own."""

    why: str

    @property
    def ended(self) -> bool:
        """Whether nothing can follow but the end."""

    def begin(self) -> None:
        """Called before the pass of the model after which `mask` is asked for."""

    def mask(self) -> NDArray[np.bool_]:
        """(vocabulary,) which tokens may come next."""

    def take(self, token: int) -> None:
        """The token that was picked."""


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


def check_adapter(adapter: str | None, known: Collection[str]) -> None:
    """Refuse an adapter that the model has not.

    Raises:
        RequestError: it has not.
    """
    if adapter is not None and adapter not in known:
        there = f"it has: {', '.join(sorted(known))}" if known else "it has none"
        raise RequestError(f"the model has no adapter {adapter}", there)


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Attributes:
        id: unique among those that are there.
        prompt: token ids.
        most: new tokens at most; fewer where the context ends.
        how: how they are picked.
        ignore_end: goes on after an end token.
        limit: what it may say; None: anything.
        adapter: the model's adapter that it is answered with; None: the base alone.
    """

    id: int
    prompt: tuple[int, ...]
    most: int
    how: Picking = field(default_factory=Picking)
    ignore_end: bool = False
    limit: Limited | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Progress:
    """A request got a token. `finish`: it was the last one, as the end token came, nothing else may follow, or there is no room; or,
    with `failed`, none was found, and `why` says it. `cached`: tokens of the prompt that had not to be read, told with the first token."""

    id: int
    picked: Picked
    finish: Finish | None = None
    cached: int = 0
    why: str = ""


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
        self._worn: list[str | None] = [None] * engine.rows
        """Of each row the adapter that these were read with."""
        self.admitted: list[int] = []
        """Requests that got a row in the last step."""

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
        check_adapter(request.adapter, self._engine.adapters)
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
        """Read on in the oldest prompts that are not read, a chunk of tokens at most, and give every answer that has begun its next
        token.

        Raises:
            ModelError: the engine failed; what it held is lost.
        """
        self._admit()
        found = []
        reading = [row for row, busy in self._busy.items() if busy.last is None]
        fresh, left = set(), self._chunk
        for row in reading:  # in the order in which they came
            left -= self._next(row)
            if left < 0:
                break
            found += self._read(row)
            if row in self._busy and self._busy[row].last is None:
                break
            fresh.add(row)
        going = {row: busy.last for row, busy in self._busy.items() if busy.last is not None and row not in fresh}
        if going:
            for row in going:
                if limit := self._busy[row].request.limit:
                    limit.begin()
            logits = self._engine.decode({row: last for row, last in going.items() if last is not None})
            found += self._tokens(logits)
        self._gather()
        return found

    def _admit(self) -> None:
        self.admitted = []
        while self._waiting and len(self._busy) < self._engine.rows:
            request = self._waiting.popleft()
            self.admitted.append(request.id)
            row, shared = self._choose(request)
            self._engine.cut(row, shared)
            shared = self._engine.length(row)  # none where the model has no state of a beginning
            self._engine.wear(row, request.adapter)
            self._held[row], self._worn[row] = request.prompt[:shared], request.adapter
            room = min(request.most, self._engine.context_length - len(request.prompt))
            self._busy[row] = _Busy(request, Picker(request.how, request.prompt, request.id), room, shared)

    def _choose(self, request: Request) -> tuple[int, int]:
        """A free row, and how many tokens of it the prompt begins with: that which spares most reading; among equals the one that
        holds least, then the lowest, so that few idle rows lie below busy ones."""
        best: tuple[int, int, int] | None = None
        for row in range(self._engine.rows):
            if row not in self._busy:
                same = self._worn[row] == request.adapter
                shared = self._shared(self._held[row], request.prompt) if same else 0
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

    def _next(self, row: int) -> int:
        """Tokens of the next piece of its prompt."""
        return min(self._chunk, len(self._busy[row].request.prompt) - self._engine.length(row))

    def _read(self, row: int) -> list[Progress]:
        busy = self._busy[row]
        prompt, begin = busy.request.prompt, self._engine.length(row)
        end = begin + self._next(row)
        logits = self._engine.feed(row, prompt[begin:end])
        if (end - begin) == self._chunk:
            self._held[row] = prompt[:end]
        return self._tokens({row: logits}) if end == len(prompt) else []

    def _tokens(self, logits: Mapping[int, NDArray[np.float32]]) -> list[Progress]:
        """The next token of each of these rows."""
        rows = sorted(logits)
        some = [self._busy[row] for row in rows]
        allowed = [busy.request.limit.mask() if busy.request.limit else None for busy in some]
        picked = pick([busy.picker for busy in some], [logits[row] for row in rows], allowed)
        return [self._token(row, one) for row, one in zip(rows, picked, strict=True)]

    def _token(self, row: int, picked: Picked) -> Progress:
        busy = self._busy[row]
        request = busy.request
        limit = request.limit
        if limit:
            limit.take(picked.token)
            if limit.why:
                self._free(row)
                return Progress(request.id, picked, "failed", why=limit.why)
        cached = busy.cached if not busy.tokens else 0
        busy.tokens.append(picked.token)
        busy.last = picked.token
        finish: Finish | None = None
        if (picked.token in self._engine.end_ids and not request.ignore_end) or (limit and limit.ended):
            finish = "stop"
        elif len(busy.tokens) == busy.room:
            finish = "length"
        if finish:
            self._free(row)
        return Progress(request.id, picked, finish, cached)

    def _free(self, row: int) -> None:
        """The row keeps the whole chunks of its prompt for the next one that begins alike."""
        del self._busy[row]
        self._engine.cut(row, min(len(self._held[row]), self._engine.length(row)))
        self._held[row] = self._held[row][: self._engine.length(row)]

    def _gather(self) -> None:
        """Move the last answer down while more than half of the rows up to it are idle: they are computed in vain."""
        while self._busy and self._engine.packed:
            last = max(self._busy)
            if len(self._busy) * 2 > last + 1 or self._busy[last].last is None:
                return
            target = min(row for row in range(last) if row not in self._busy)
            self._engine.move(last, target)
            self._held[target], self._held[last] = self._held[last], ()
            self._worn[target], self._worn[last] = self._worn[last], None
            self._busy = {target if row == last else row: busy for row, busy in self._busy.items()}
