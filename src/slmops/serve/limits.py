"""What one key may ask for: requests and tokens in a minute, and answers at a time.

Token buckets: a minute's worth may come at once, and flows back evenly. An answer's tokens are known only when they are there, so
a bucket may be overdrawn by the answers that were let in; the next one then waits until it is paid back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from slmops.serve.keys import Key
from slmops.serve.refusals import Headers, LimitError

ROUNDING = 1e-6
"""Who waits as long as it was told is let in."""


@dataclass(frozen=True)
class Limits:
    """None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    answers: int | None = None

    def of(self, key: Key | None) -> Limits:
        """A key's own go before those of the server."""
        if key is None:
            return self
        return Limits(
            self.requests_per_minute if key.requests_per_minute is None else key.requests_per_minute,
            self.tokens_per_minute if key.tokens_per_minute is None else key.tokens_per_minute,
            self.answers if key.answers is None else key.answers,
        )


class Bucket:
    """So much a minute. `level` is what is there, below zero where it is overdrawn."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.size = per_minute
        self.level, self._then = float(per_minute), now

    def fill(self, now: float) -> None:
        """What has flowed back."""
        self.level = min(self.size, self.level + max(0.0, now - self._then) * self.size / 60)
        self._then = now

    def resize(self, per_minute: int) -> None:
        """Another limit from now on."""
        self.level += per_minute - self.size
        self.size = per_minute

    def until(self, wanted: float) -> float:
        """Seconds until so much is there."""
        return max(0.0, (min(wanted, self.size) - self.level) * 60 / self.size)


class Account:
    """What one key has used."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.answers = 0
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.set(limits)

    def set(self, limits: Limits) -> None:
        """Limits, which may have changed."""
        now = self._clock()
        self._limits = limits
        self._requests = self._renewed(self._requests, limits.requests_per_minute, now)
        self._tokens = self._renewed(self._tokens, limits.tokens_per_minute, now)

    def _renewed(self, old: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
        if per_minute is None:
            return None
        if old is None:
            return Bucket(per_minute, now)
        old.fill(now)
        if old.size != per_minute:
            old.resize(per_minute)
        return old

    def request(self) -> None:
        """Let a request in.

        Raises:
            LimitError: too many in this minute, or too many tokens.
        """
        now = self._clock()
        for bucket, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            if bucket is not None:
                bucket.fill(now)
                if bucket.level < 1 - ROUNDING:
                    after = bucket.until(1)
                    raise LimitError(
                        f"the limit is {bucket.size} {what} a minute", f"ask again in {whole_seconds(after)} s", after
                    )
        if self._requests is not None:
            self._requests.level -= 1

    def spend(self, tokens: int) -> None:
        """Tokens that were read or written."""
        if self._tokens is not None:
            self._tokens.fill(self._clock())
            self._tokens.level -= tokens

    def begin(self) -> None:
        """Let an answer in; `end` gives its place back.

        Raises:
            LimitError: too many at a time.
        """
        if self._limits.answers is not None and self.answers >= self._limits.answers:
            raise LimitError(
                f"the limit is {self._limits.answers} answers at a time", "ask again when one has ended", 1.0
            )
        self.answers += 1

    def end(self) -> None:
        """An answer has ended."""
        self.answers -= 1

    def headers(self) -> Headers:
        """What is left, as OpenAI's clients read it."""
        found: list[tuple[str, str]] = []
        now = self._clock()
        for bucket, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            if bucket is not None:
                bucket.fill(now)
                found += [
                    (f"x-ratelimit-limit-{what}", f"{bucket.size}"),
                    (f"x-ratelimit-remaining-{what}", str(max(0, math.floor(bucket.level)))),
                    (f"x-ratelimit-reset-{what}", f"{bucket.until(bucket.size):.3f}s"),
                ]
        return found


def whole_seconds(seconds: float) -> int:
    """As Retry-After says them."""
    return max(1, math.ceil(seconds - ROUNDING))


class Accounts:
    """The account of each key, by its name, and one for all who ask without a key."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._accounts: dict[str, Account] = {}

    def of(self, key: Key | None) -> Account:
        """The account of a key."""
        name, limits = key.name if key else "", self._limits.of(key)
        if name not in self._accounts:
            self._accounts[name] = Account(limits, self._clock)
        account = self._accounts[name]
        account.set(limits)
        return account
