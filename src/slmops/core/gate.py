"""Gates: when a measured number meets a bound, when it misses it, and how much more would be needed to tell.

A gate looks at an interval, not at a point. It passes if the whole interval meets the bound, fails if the whole
interval misses it, and is undecided otherwise. Laws: a narrower interval inside a wider one never turns `passed` into
`failed` or back, and an interval without ends (`None`) is never decided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["passed", "failed", "undecided"]
MOST = 99.0
"""Estimates above this many times the present number are not given; they would be guesses."""


@dataclass(frozen=True)
class Need:
    """How many more units (examples, prompts, rounds) a decision would take: `count`, or more than that."""

    count: int
    more_than: bool = False

    def __str__(self) -> str:
        return f"more than {self.count:,}" if self.more_than else f"about {self.count:,}"


def judge(low: float | None, high: float | None, *, at_least: float | None, at_most: float | None) -> Verdict:
    """The verdict on an interval. Exactly one bound must be given; the bound itself still meets it."""
    if (at_least is None) == (at_most is None):
        raise ValueError("give exactly one of at_least, at_most")
    if low is None or high is None:
        return "undecided"
    if at_least is not None:
        return "passed" if low >= at_least else "failed" if high < at_least else "undecided"
    assert at_most is not None
    return "passed" if high <= at_most else "failed" if low > at_most else "undecided"


def needed(
    value: float, low: float, high: float, n: int, *, at_least: float | None = None, at_most: float | None = None
) -> Need:
    """How many more units would decide an undecided gate if the value stayed where it is.

    An interval's half width shrinks with the square root of the number of units, so the side of the interval that
    reaches over the bound has to shrink to the distance between value and bound. Rounded up to two digits.
    """
    bound = at_least if at_least is not None else at_most
    if bound is None:
        raise ValueError("give exactly one of at_least, at_most")
    distance = abs(value - bound)
    reach = value - low if value >= bound else high - value
    if distance == 0.0 or (reach / distance) ** 2 > MOST + 1:
        return Need(_rounded_up(MOST * n), more_than=True)
    return Need(_rounded_up(max(1.0, n * ((reach / distance) ** 2 - 1))))


def _rounded_up(count: float) -> int:
    whole = math.ceil(count - 1e-9)
    step = int(10 ** max(0, len(str(whole)) - 2))
    return -(-whole // step) * step


def overall(verdicts: list[Verdict]) -> Verdict:
    """One verdict of many: failed if any failed, else undecided if any is, else passed (also where there are none)."""
    if "failed" in verdicts:
        return "failed"
    return "undecided" if "undecided" in verdicts else "passed"
