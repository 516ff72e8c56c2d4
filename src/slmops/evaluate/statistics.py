"""How sure a measured number is: paired bootstrap, exact tests and what a test set can show at all.

All intervals are two-sided at a given confidence. Scores of several models on the same n examples share one
`Bootstrap`: each resample draws the same examples for every model, so differences and ratios are paired. A bootstrap
cannot see what did not happen in the sample (no error in 20 answers would give an interval of no width), so for scores
that are shares it is widened to the closed form that can: Wilson (1927) for one share, Bonett and Price (2012) for a
paired difference, Bonett and Price (2006) for a paired ratio. Other scores use them where the bootstrap sees nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from slmops.evaluate.metrics import Columns

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
CHUNK = 1 << 21
KEEP = 1 << 28


@dataclass(frozen=True)
class Interval:
    """A number and the interval around it; `low <= value <= high`."""

    value: float
    low: float
    high: float

    def negated(self) -> Interval:
        """The interval of minus the number."""
        return Interval(-self.value, -self.high, -self.low)

    def reduction(self) -> Interval:
        """One minus the number: a ratio of 0.1 is a reduction of 0.9."""
        return Interval(1 - self.value, 1 - self.high, 1 - self.low)


class Bootstrap:
    """Resamples of n examples with replacement, as how often each example is drawn. Same seed, same draws.

    Args:
        n: number of examples.
        resamples: how many resamples.
        seed: seeds the draws.
    """

    def __init__(self, n: int, resamples: int, seed: int) -> None:
        if n < 1 or resamples < 1:
            raise ValueError("a bootstrap needs at least one example and one resample")
        self.n, self.resamples, self.seed = n, resamples, seed
        self._kept: list[NDArray[np.uint8]] | None = None

    def weights(self) -> Iterator[Floats]:
        """Draw counts in blocks (rows, n), rows adding up to `resamples`; every row sums to n."""
        keep = self._kept is None and self.n * self.resamples <= KEEP
        if self._kept is not None:
            yield from (block.astype(np.float64) for block in self._kept)
            return
        kept: list[NDArray[np.uint8]] = []
        step = max(1, CHUNK // self.n)
        for start in range(0, self.resamples, step):
            rows = min(step, self.resamples - start)
            draws = np.random.default_rng([self.seed, start]).integers(0, self.n, (rows, self.n))
            flat = (draws + np.arange(rows)[:, None] * self.n).ravel()
            block = np.bincount(flat, minlength=rows * self.n).reshape(rows, self.n).astype(np.uint8)
            if keep:
                kept.append(block)
            yield block.astype(np.float64)
        if keep:
            self._kept = kept

    def sums(self, values: Floats) -> Floats:
        """Sum of `values` (n, k) over each resample: (resamples, k)."""
        return np.concatenate([block @ values for block in self.weights()])


class Score(Protocol):
    """A score of one model on the examples of a test set."""

    @property
    def value(self) -> float:
        """The score on the examples as they are; NaN if it looks at none of them."""

    @property
    def binary(self) -> bool:
        """Whether every example counts 0 or 1."""

    def draws(self, bootstrap: Bootstrap) -> Floats:
        """The score on each resample, (resamples,)."""


class RatioScore:
    """A ratio of sums over the examples: every metric but macro-F1."""

    def __init__(self, columns: Columns) -> None:
        self.above = np.asarray(columns.above, dtype=np.float64)
        self.below = np.asarray(columns.below, dtype=np.float64)

    @property
    def value(self) -> float:
        """The one sum over the other."""
        total = float(self.below.sum())
        return float(self.above.sum()) / total if total else math.nan

    @property
    def binary(self) -> bool:
        """Whether all parts are 0 or 1."""
        return bool(np.isin(self.above, (0.0, 1.0)).all() and np.isin(self.below, (0.0, 1.0)).all())

    def draws(self, bootstrap: Bootstrap) -> Floats:
        """The ratio of the resampled sums, (resamples,)."""
        sums = bootstrap.sums(np.stack([self.above, self.below], axis=1))
        return _divide(sums[:, 0], sums[:, 1])


class MacroF1Score:
    """Mean F1 over the labels that occur in gold, made again from the counts of each resample."""

    binary = False

    def __init__(self, golds: Sequence[str], answers: Sequence[str]) -> None:
        labels = {label: code for code, label in enumerate(sorted({gold.strip() for gold in golds}))}
        self.classes = len(labels)
        self.gold = np.array([labels[gold.strip()] for gold in golds])
        self.answer = np.array([labels.get(answer.strip(), self.classes) for answer in answers])

    @property
    def value(self) -> float:
        """Macro-F1 of the examples as they are."""
        return float(self._f1(np.ones((1, len(self.gold))))[0])

    def draws(self, bootstrap: Bootstrap) -> Floats:
        """Macro-F1 of each resample over the labels that it holds, (resamples,)."""
        return np.concatenate([self._f1(block) for block in bootstrap.weights()])

    def _f1(self, weights: Floats) -> Floats:
        hits = self._per_class(weights * (self.gold == self.answer), self.gold)
        golds, answers = self._per_class(weights, self.gold), self._per_class(weights, self.answer)
        f1 = np.where(golds > 0, 2 * hits / np.maximum(golds + answers, 1), 0.0)
        return f1.sum(axis=1) / (golds > 0).sum(axis=1)  # type: ignore[no-any-return]

    def _per_class(self, weights: Floats, codes: Indices) -> Floats:
        order = np.argsort(codes, kind="stable")
        present, starts = np.unique(codes[order], return_index=True)
        out = np.zeros((len(weights), self.classes + 1))
        out[:, present] = np.add.reduceat(weights[:, order], starts, axis=1)
        return out[:, : self.classes]


def _divide(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _z(confidence: float) -> float:
    return float(norm.ppf(0.5 + confidence / 2))


def percentile(value: float, draws: Floats, confidence: float) -> Interval:
    """Percentile interval of bootstrap draws; draws that are not numbers are left out."""
    finite = draws[np.isfinite(draws)]
    if not len(finite) or not math.isfinite(value):
        return Interval(value, value, value)
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, min(value, float(low)), max(value, float(high)))


def _hull(interval: Interval, other: tuple[float, float]) -> Interval:
    return Interval(interval.value, min(interval.low, other[0]), max(interval.high, other[1]))


def wilson(hits: float, n: float, confidence: float) -> tuple[float, float]:
    """Score interval of a share of `hits` in n (Wilson 1927)."""
    z = _z(confidence)
    return _wilson(hits, n, z)


def _wilson(hits: float, n: float, z: float) -> tuple[float, float]:
    share = hits / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(max(0.0, share * (1 - share) / n + z * z / (4 * n * n)))
    scale = 1 + z * z / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def share_difference(better: float, worse: float, n: float, confidence: float) -> tuple[float, float]:
    """Interval of a paired difference of two shares, (better - worse) / n (Bonett and Price 2012).

    Args:
        better, worse: examples that only the second, only the first got right.
    """
    up, down = (better + 1) / (n + 2), (worse + 1) / (n + 2)
    spread = _z(confidence) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - spread), min(1.0, up - down + spread)


def share_ratio(both: float, better: float, worse: float, confidence: float) -> tuple[float, float]:
    """Interval of a paired ratio of two shares, (both + better) / (both + worse) (Bonett and Price 2006)."""
    n = both + better + worse
    second, first = both + better, both + worse
    if not n:
        return 0.0, math.inf
    joint = math.sqrt((better + worse + 2) / ((second + 1) * (first + 1)))
    alone = sum(math.sqrt((1 - (x + 1) / (n + 2)) / (x + 1)) for x in (second, first))
    z = _z(confidence) * joint / alone
    second_low, second_high = _wilson(second, n, z)
    first_low, first_high = _wilson(first, n, z)
    return second_low / first_high, second_high / first_low if first_low else math.inf


def discordant(reference: Score, candidate: Score) -> tuple[int, int, int, int] | None:
    """Of two binary scores: (n looked at, both right, only the candidate right, only the reference right)."""
    if not (isinstance(reference, RatioScore) and isinstance(candidate, RatioScore)):
        return None
    if not (reference.binary and candidate.binary and np.array_equal(reference.below, candidate.below)):
        return None
    seen = reference.below > 0
    first, second = reference.above[seen] > 0, candidate.above[seen] > 0
    return int(seen.sum()), int((first & second).sum()), int((~first & second).sum()), int((first & ~second).sum())


def score_interval(score: Score, bootstrap: Bootstrap, confidence: float) -> Interval:
    """Interval of one model's score."""
    interval = percentile(score.value, score.draws(bootstrap), confidence)
    if not math.isfinite(score.value):
        return interval
    n = float((score.below > 0).sum()) if isinstance(score, RatioScore) else float(bootstrap.n)
    if score.binary or interval.low == interval.high:
        return _hull(interval, wilson(score.value * n, n, confidence))
    return interval


@dataclass(frozen=True)
class Paired:
    """A paired comparison of a candidate with a reference.

    Attributes:
        difference: candidate minus reference.
        ratio: candidate over reference, None where the reference is 0.
        better, worse: examples that only the candidate, only the reference got right; None if the score is not binary.
        p: two-sided p value of "no difference".
        test: `mcnemar_exact` or `bootstrap`.
        detectable: smallest difference that a test set like this shows with 80 % power.
    """

    difference: Interval
    ratio: Interval | None
    better: int | None
    worse: int | None
    p: float
    test: str
    detectable: float


def compare_scores(
    reference: Score, candidate: Score, bootstrap: Bootstrap, confidence: float, power: float = 0.8
) -> Paired:
    """Difference and ratio of two scores on the same examples, with intervals, a p value and what could be seen."""
    first, second = reference.draws(bootstrap), candidate.draws(bootstrap)
    difference = percentile(candidate.value - reference.value, second - first, confidence)
    ratio = (
        percentile(candidate.value / reference.value, _divide(second, first), confidence)
        if reference.value > 0
        else None
    )
    pairs = discordant(reference, candidate)
    if pairs is not None:
        n, both, better, worse = pairs
        difference = _hull(difference, share_difference(better, worse, n, confidence))
        ratio = _hull(ratio, share_ratio(both, better, worse, confidence)) if ratio is not None else None
        p, detectable = mcnemar(better, worse), detectable_share(better + worse, n, confidence, power)
        return Paired(difference, ratio, better, worse, p, "mcnemar_exact", detectable)
    if difference.low == difference.high:
        difference = _hull(difference, share_difference(0, 0, bootstrap.n, confidence))
        ratio = _hull(ratio, share_ratio(bootstrap.n, 0, 0, confidence)) if ratio is not None else None
        return Paired(
            difference, ratio, None, None, 1.0, "bootstrap", detectable_share(0, bootstrap.n, confidence, power)
        )
    gaps = (second - first)[np.isfinite(second - first)]
    tail = min(np.sum(gaps <= 0), np.sum(gaps >= 0))
    p = min(1.0, 2 * (float(tail) + 1) / (len(gaps) + 1))
    detectable = (_z(confidence) + float(norm.ppf(power))) * float(np.std(gaps))
    return Paired(difference, ratio, None, None, p, "bootstrap", detectable)


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p value of McNemar's test from the two discordant counts."""
    return float(binomtest(better, better + worse, 0.5).pvalue) if better + worse else 1.0


def detectable_share(discordant_pairs: float, n: float, confidence: float, power: float = 0.8) -> float:
    """Smallest paired difference of shares that McNemar's test shows with the given power.

    Solves `d sqrt(n) = z_a sqrt(r) + z_b sqrt(r - d^2)` for d, with r the rate of discordant pairs (one pair each way
    added, so that a sample without any still gives a number).
    """
    rate = (discordant_pairs + 2) / (n + 2)
    a, b, root = _z(confidence) * math.sqrt(rate), float(norm.ppf(power)), math.sqrt(n)
    inside = a * a * n - (n + b * b) * (a * a - b * b * rate)
    return min(1.0, (a * root + math.sqrt(max(0.0, inside))) / (n + b * b))


class Timings:
    """Seconds per round and prompt of one model, (rounds, prompts), the same prompts in every round."""

    def __init__(self, seconds: Sequence[Sequence[float]]) -> None:
        self.seconds = np.asarray(seconds, dtype=np.float64)
        if self.seconds.ndim != 2 or not self.seconds.size:
            raise ValueError("timings are a table of rounds by prompts")

    def typical(self) -> Floats:
        """Per prompt, the median over the rounds, (prompts,)."""
        return np.median(self.seconds, axis=0)


def _crossed(timings: Timings, resamples: int, seed: int) -> Iterator[tuple[Indices, Indices]]:
    rounds, prompts = timings.seconds.shape
    for start in range(0, resamples, step := max(1, CHUNK // timings.seconds.size)):
        rows, rng = min(step, resamples - start), np.random.default_rng([seed, start])
        picked = rng.integers(0, prompts, (rows, prompts))
        yield rng.integers(0, rounds, (rows, rounds)), picked


def time_quantile(timings: Timings, share: float | None, confidence: float, resamples: int, seed: int) -> Interval:
    """A quantile (or, with None, the mean) of all timings; rounds and prompts are both resampled. Seconds."""

    def statistic(block: Floats) -> Floats:
        flat = block.reshape(len(block), -1)
        return flat.mean(axis=1) if share is None else np.quantile(flat, share, axis=1)

    draws = [
        statistic(timings.seconds[rounds[:, :, None], prompts[:, None, :]])
        for rounds, prompts in _crossed(timings, resamples, seed)
    ]
    return percentile(float(statistic(timings.seconds[None])[0]), np.concatenate(draws), confidence)


def time_ratio(reference: Timings, candidate: Timings, confidence: float, resamples: int, seed: int) -> Interval:
    """Mean time of the candidate over that of the reference, paired by prompt and round.

    Per prompt the median over the rounds counts, so that one hiccup of the machine does not; prompts and rounds are
    both resampled, the same ones for both models.
    """
    if reference.seconds.shape != candidate.seconds.shape:
        raise ValueError("timings of the same rounds and prompts are needed")

    def mean(seconds: Floats, rounds: Indices, prompts: Indices) -> Floats:
        medians = np.median(seconds[rounds], axis=1)
        return np.take_along_axis(medians, prompts, axis=1).mean(axis=1)  # type: ignore[no-any-return]

    draws = [
        mean(candidate.seconds, rounds, prompts) / mean(reference.seconds, rounds, prompts)
        for rounds, prompts in _crossed(reference, resamples, seed)
    ]
    value = float(candidate.typical().mean() / reference.typical().mean())
    return percentile(value, np.concatenate(draws), confidence)


def spread(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean, least and greatest of repeated measurements; one measurement has no spread. Not a confidence interval."""
    mean = sum(values) / len(values)
    return (mean, min(values), max(values)) if len(values) > 1 else (mean, None, None)
