"""Two versions of a model on the same requests: how often they say the same, and what they take, as differences of pairs.

Shares have Wilson's interval (1927), means of differences one of resampled pairs; both at 95 %. Only the last `KEPT` pairs count.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean
from typing import Any

KEPT = 10_000
RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Answered:
    """An answer that one version gave, whole. Seconds are from when it was asked."""

    text: str
    tokens: int
    first_s: float
    total_s: float


@dataclass
class Arm:
    """What a version made of the requests that it alone answered. `left`: clients that went away before the end."""

    answered: int = 0
    failed: int = 0
    left: int = 0


@dataclass
class Pairs:
    """What two versions made of the same requests. `missed`: not asked, as the candidate was busy; `failed`: it gave no answer."""

    current: Arm = field(default_factory=Arm)
    candidate: Arm = field(default_factory=Arm)
    missed: int = 0
    failed: int = 0
    kept: deque[tuple[Answered, Answered]] = field(default_factory=lambda: deque(maxlen=KEPT))
    seen: int = 0
    """Pairs that there have been, those that are no longer kept too."""

    def add(self, current: Answered, candidate: Answered) -> None:
        """A pair."""
        self.kept.append((current, candidate))
        self.seen += 1

    def report(self) -> dict[str, Any]:
        """Everything as JSON. Intervals are {value, low, high}; a difference is the candidate's less the current version's."""
        pairs = list(self.kept)
        shadow: dict[str, Any] = {"pairs": len(pairs), "seen": self.seen, "missed": self.missed, "failed": self.failed}
        if pairs:
            equal = sum(one.text == other.text for one, other in pairs)
            shadow["agreement"] = interval(equal / len(pairs), *wilson(equal, len(pairs)))
            for name in ("first_s", "total_s", "tokens"):
                first = [float(getattr(one, name)) for one, _ in pairs]
                second = [float(getattr(other, name)) for _, other in pairs]
                gaps = [b - a for a, b in zip(first, second, strict=True)]
                shadow[name] = {"current": fmean(first), "candidate": fmean(second), "difference": resampled(gaps)}
        return {"requests": {"current": vars(self.current), "candidate": vars(self.candidate)}, "shadow": shadow}


def interval(value: float, low: float | None, high: float | None) -> dict[str, float | None]:
    """A number and the interval around it."""
    return {"value": value, "low": low, "high": high}


def wilson(hits: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of a share of `hits` in n."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = hits / n
    middle, scale = share + z * z / (2 * n), 1 + z * z / n
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def resampled(values: Sequence[float], seed: int = 0) -> dict[str, float | None]:
    """The mean and its interval, by means of resampled values. One value has no interval: None."""
    import numpy as np

    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return interval(mean, None, None)
    draw = np.random.default_rng(seed)
    means = [array[draw.integers(0, len(array), len(array))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return interval(mean, float(low), float(high))
