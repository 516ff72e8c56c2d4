"""What is known of a request while it is answered: who asked, when its tokens came, how it ended.

One `Record` for each HTTP request, found through a context variable by whatever answers it, and told to metrics, logs and traces
when it is over. One `Watch` for each answer. No text of prompts or answers is kept unless `texts` says so.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Coroutine, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

from slmops.errors import ResourceError
from slmops.serve.limits import Account
from slmops.serve.mailbox import Mailbox
from slmops.serve.refusals import DeadlineError, LimitError

GAPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
Done = TypeVar("Done")
WAITS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Counts:
    """A histogram: how many values were at most each bound, in the form of Prometheus. One call costs under a microsecond."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Bounds and counts up to each."""
        found, total = [], 0
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            total += count
            found.append(("+Inf" if bound is None else repr(bound), float(total)))
        return found


@dataclass
class Told:
    """What one model has to tell. `deaths`: of its process, ever."""

    gaps: Counts = field(default_factory=lambda: Counts(GAPS))
    waits: Counts = field(default_factory=lambda: Counts(WAITS))
    deaths: int = 0


@dataclass
class Watch:
    """One answer. Times are those of `perf_counter`.

    Attributes:
        waited: seconds until it had a row; None while it has none.
        finish: why it ended; None if it was cut off.
    """

    record: Record
    model: str
    prompt: int
    told: Told
    began: float = field(default_factory=perf_counter)
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    cached: int = 0
    waited: float | None = None
    finish: str | None = None
    _said: list[str] = field(default_factory=list)

    def started(self, waited: float) -> None:
        """It got a row."""
        self.waited = waited
        self.told.waits.add(waited)

    def token(self, cached: int, text: str, count: int = 1) -> None:
        """It got a token, or several that came at once, which then share the time since the last."""
        if self.record.texts is not None:
            self._said.append(text)
        now = perf_counter()
        if self.tokens:
            self.told.gaps.add((now - self.last) / count, count)
        else:
            self.first, self.cached = now, cached
        self.last = now
        self.tokens += count

    def end(self, finish: str | None, failure: BaseException | None) -> None:
        """It is over."""
        self.finish = finish
        if self.record.texts is not None:
            self.record.texts.append("".join(self._said))
        if self.record.account is not None:
            self.record.account.end()
            self.record.account.spend(self.tokens)
        if isinstance(failure, DeadlineError):
            self.record.reason = "deadline"
        elif isinstance(failure, ResourceError):
            self.record.reason = "overloaded"


@dataclass
class Record:
    """One request.

    Attributes:
        route: the pattern of its path, of a fixed set; empty if there is none.
        key: name of the key that asked; empty without one.
        keeper: whether who asks may load and unload models.
        deadline: in the event loop's time.
        began, ended: of `perf_counter`.
        time: seconds since 1970 when it came.
        status: 0 if it ended without an answer.
        reason: why it was refused, in a word of a fixed set.
        failed: the server did not bring it to its end.
        texts: what was asked and said; None: not to be kept.
    """

    id: str = ""
    method: str = ""
    path: str = ""
    route: str = ""
    client: str = ""
    key: str = ""
    keeper: bool = True
    account: Account | None = None
    deadline: float | None = None
    began: float = field(default_factory=perf_counter)
    ended: float = 0.0
    time: float = 0.0
    status: int = 0
    reason: str = ""
    failed: bool = False
    parent: dict[str, str] = field(default_factory=dict)
    answers: list[Watch] = field(default_factory=list)
    texts: list[str] | None = None

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.ended - self.began

    @property
    def model(self) -> str:
        """That was asked; empty if none was."""
        return self.answers[0].model if self.answers else ""

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(watch.prompt for watch in self.answers)

    @property
    def tokens(self) -> int:
        """Written."""
        return sum(watch.tokens for watch in self.answers)

    @property
    def first_token(self) -> float | None:
        """Seconds until the first token of any answer."""
        times = [watch.first for watch in self.answers if watch.tokens]
        return min(times) - self.began if times else None

    @property
    def cut(self) -> bool:
        """Whether an answer was left before its end."""
        return any(watch.finish is None for watch in self.answers)


_current: ContextVar[Record | None] = ContextVar("record", default=None)
enter, leave = _current.set, _current.reset


def current() -> Record:
    """The record of the request that is being answered, or one that nobody reads."""
    return _current.get() or Record()


def watching(model: str, prompt: int, told: Told) -> Watch:
    """Begin an answer to a prompt of so many tokens. Who calls this calls `Watch.end`.

    Raises:
        LimitError: the key has as many answers as it may.
    """
    record = current()
    if record.account is not None:
        try:
            record.account.begin()
        except LimitError:
            record.reason = "answers"
            raise
        record.account.spend(prompt)
    watch = Watch(record, model, prompt, told)
    record.answers.append(watch)
    return watch


def left() -> float | None:
    """Seconds that the request has; None: as long as it takes."""
    deadline = current().deadline
    return None if deadline is None else deadline - asyncio.get_running_loop().time()


def too_late() -> DeadlineError:
    """The error of an answer whose time is over."""
    return DeadlineError("the answer was not there before its deadline", "give it more time, or ask for fewer tokens")


async def within(work: Coroutine[Any, Any, Done]) -> Done:
    """What comes of some work, waited for as long as the request has time.

    Raises:
        DeadlineError: it has none left.
    """
    deadline = current().deadline
    if deadline is None:
        return await work
    try:
        async with asyncio.timeout_at(deadline) as limit:
            return await work
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise too_late() from error


def remind(found: Mailbox[Any]) -> asyncio.TimerHandle | None:
    """Put `too_late` into a mailbox when the request's time is over. Who calls this cancels it."""
    deadline = current().deadline
    if deadline is None:
        return None
    return asyncio.get_running_loop().call_at(deadline, lambda: found.put(too_late()))
