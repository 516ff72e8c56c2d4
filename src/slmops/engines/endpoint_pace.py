"""How fast an endpoint is asked: backoff with full jitter, Retry-After, rate-limit headers, a limit that adapts.

The number of requests under way is halved when the endpoint says "too many" and grows by one per round of answers.
A wait that the endpoint asks for holds back all requests, not only the one that was told.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

LONGEST_WAIT_S = 900.0
"""A longer wait than this that an endpoint asks for is an error, so that nobody waits a day without knowing."""


@dataclass(frozen=True)
class Backoff:
    """Waiting times between tries: uniform from 0 to `first_s` · 2^try, at most `most_s` (full jitter)."""

    first_s: float = 0.5
    most_s: float = 30.0

    def delay(self, tried: int, seed: str) -> float:
        """Seconds to wait after the try of that number (from 0). The same seed gives the same delay."""
        return random.Random(seed).uniform(0.0, min(self.most_s, self.first_s * 2.0 ** min(tried, 30)))


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a reply asks to wait, from Retry-After (seconds or an HTTP date) or its millisecond forms.

    Args:
        headers: names in any case are looked up in lower case.
        now: seconds since the epoch, used for a date where the reply has no Date of its own.
    """
    for name in ("retry-after-ms", "x-ms-retry-after-ms"):
        if (value := _number(headers.get(name))) is not None:
            return value / 1000
    text = headers.get("retry-after")
    if text is None:
        return None
    if (value := _number(text)) is not None:
        return value
    until, own = _date(text), _date(headers.get("date") or "")
    return None if until is None else max(0.0, until - (own if own is not None else now))


def exhausted_for(headers: Mapping[str, str]) -> float | None:
    """Seconds until the limit is refilled, if an x-ratelimit-remaining-… header says that nothing is left."""
    waits = []
    for what in ("requests", "tokens"):
        left = _number(headers.get(f"x-ratelimit-remaining-{what}"))
        wait = duration(headers.get(f"x-ratelimit-reset-{what}") or "")
        if left is not None and left <= 0 and wait is not None:
            waits.append(wait)
    return max(waits) if waits else None


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def duration(text: str) -> float | None:
    """Seconds of `1m30.5s`, `350ms`, `6m0s`, `2h` or plain `12.5`; None if it is none of these."""
    text = text.strip().lower()
    if (value := _number(text)) is not None:
        return value
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|[smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return float(sum(float(number) * _UNITS[unit] for number, unit in parts))


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"\s*\d{1,12}(\.\d{1,9})?\s*", text) else None


def _date(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


class Pace:
    """Lets requests through. Use within one event loop.

    Args:
        most: requests under way at most.
        now: a clock in seconds that never goes back.
        sleep: waits for seconds.
    """

    def __init__(self, most: int, now: Callable[[], float], sleep: Callable[[float], Awaitable[None]]) -> None:
        self.most = most
        self.limit = float(most)
        self.active = 0
        self._now, self._sleep = now, sleep
        self.closed = False
        self._not_before = 0.0
        self._eased = 0
        self._changed = asyncio.Condition()

    async def enter(self) -> int:
        """Wait until a request may go out; gives a number that `leave` wants back. A pace that is `closed` holds nothing back for long."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.active < max(1, int(self.limit)))
            self.active += 1
        while not self.closed and (wait := self._not_before - self._now()) > 0:
            await self._sleep(wait)
        return self._eased

    async def leave(
        self, entered: int, *, answered: bool = False, crowded: bool = False, wait_s: float | None = None
    ) -> None:
        """A request is done: it was answered, or the endpoint is `crowded`; `wait_s` holds back all others."""
        if wait_s:
            self._not_before = max(self._not_before, self._now() + min(wait_s, LONGEST_WAIT_S))
        if crowded and entered == self._eased:  # sent since the limit last fell: what a burst brought counts once
            self.limit = max(1.0, self.limit / 2)
            self._eased += 1
        elif answered:
            self.limit = min(float(self.most), self.limit + 1 / self.limit)
        async with self._changed:
            self.active -= 1
            self._changed.notify_all()
