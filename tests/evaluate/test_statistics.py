"""Intervals and tests against closed forms, brute force and simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from slmops.core.gate import Need, judge, needed, overall
from slmops.evaluate import statistics as s
from slmops.evaluate.metrics import Columns, macro_f1


def share(values: list[bool] | np.ndarray) -> s.RatioScore:
    return s.RatioScore(Columns(tuple(float(v) for v in values), (1.0,) * len(values)))


def test_bootstrap_draws_are_seeded_and_whole() -> None:
    one, two, other = s.Bootstrap(40, 300, 1), s.Bootstrap(40, 300, 1), s.Bootstrap(40, 300, 2)
    values = np.random.default_rng(0).random((40, 2))
    first = one.sums(values)
    assert np.array_equal(first, two.sums(values)) and np.array_equal(first, one.sums(values))
    assert not np.array_equal(first, other.sums(values))
    assert np.array_equal(one.sums(np.ones((40, 1))), np.full((300, 1), 40.0))


def test_bootstrap_in_blocks_is_the_same_as_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((40, 1))
    kept = s.Bootstrap(40, 300, 1)
    kept.sums(values)
    monkeypatch.setattr(s, "KEEP", 0)
    assert np.array_equal(kept.sums(values), s.Bootstrap(40, 300, 1).sums(values))


def test_bootstrap_spread_is_the_standard_error() -> None:
    values = np.random.default_rng(3).random(500)
    draws = s.RatioScore(Columns(tuple(values), (1.0,) * 500)).draws(s.Bootstrap(500, 4000, 0))
    assert draws.std() == pytest.approx(values.std() / math.sqrt(500), rel=0.05)


def test_macro_f1_draws_are_macro_f1_of_the_resample() -> None:
    rng = random.Random(1)
    golds = [rng.choice("abc") for _ in range(25)]
    answers = [g if rng.random() < 0.6 else rng.choice("abcd") for g in golds]
    score, bootstrap = s.MacroF1Score(golds, answers), s.Bootstrap(25, 50, 0)
    assert score.value == pytest.approx(macro_f1(golds, answers))
    draws = score.draws(bootstrap)
    rows = np.concatenate(list(bootstrap.weights())).astype(int)
    for row, draw in zip(rows, draws, strict=True):
        again = [i for i, times in enumerate(row) for _ in range(times)]
        assert draw == pytest.approx(macro_f1([golds[i] for i in again], [answers[i] for i in again]))


def test_wilson_known_values() -> None:
    low, high = s.wilson(0, 10, 0.95)
    assert (low, high) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert s.wilson(9, 10, 0.95) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))


def test_nothing_wrong_is_not_certainty() -> None:
    bootstrap = s.Bootstrap(20, 500, 0)
    perfect = share([True] * 20)
    assert s.score_interval(perfect, bootstrap, 0.95).low < 0.9
    paired = s.compare_scores(perfect, perfect, bootstrap, 0.95)
    assert paired.difference.value == 0.0 and paired.difference.low < -0.05
    assert paired.ratio is not None and paired.ratio.low < 0.95
    assert paired.p == 1.0 and paired.detectable > 0.1
    answers = ["a"] * 10 + ["b"] * 10
    perfect_f1 = s.MacroF1Score(answers, answers)
    assert s.score_interval(perfect_f1, bootstrap, 0.95).low < 0.9
    assert s.compare_scores(perfect_f1, perfect_f1, bootstrap, 0.95).difference.low < -0.05


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_twice_the_smaller_tail(better: int, worse: int) -> None:
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
    assert s.mcnemar(better, worse) == pytest.approx(min(1.0, 2 * tail))


def test_comparison_is_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(1000)
    first, second = hard < 0.80, hard < 0.82
    paired = s.compare_scores(share(first), share(second), s.Bootstrap(1000, 2000, 0), 0.95)
    assert paired.difference.value == pytest.approx(second.mean() - first.mean())
    assert paired.difference.high - paired.difference.low < 0.025  # two unpaired shares would give 0.07
    assert paired.worse == 0 and paired.better == int(second.sum() - first.sum())
    assert paired.ratio is not None and paired.ratio.value == pytest.approx(second.mean() / first.mean())


def test_ratio_with_a_reference_of_nothing_is_none() -> None:
    paired = s.compare_scores(share([False] * 9), share([True] * 9), s.Bootstrap(9, 100, 0), 0.95)
    assert paired.ratio is None and paired.difference.value == 1.0


def test_detectable_difference_has_the_promised_power() -> None:
    n, rate = 2000, 0.08
    d = s.detectable_share(n * rate - 2, n, 0.95)
    rng = np.random.default_rng(0)
    up, down = (rate + d) / 2, (rate - d) / 2
    counts = rng.multinomial(n, [up, down, 1 - rate], 600)
    found = np.mean([s.mcnemar(int(b), int(w)) < 0.05 for b, w, _ in counts])
    assert 0.72 < found < 0.86  # the exact test is a little conservative


def test_time_ratio_forgives_one_hiccup_and_finds_the_ratio() -> None:
    rng = np.random.default_rng(0)
    length = rng.uniform(1, 3, 60)
    slow = length * rng.lognormal(0, 0.05, (3, 60))
    fast = 0.1 * length * rng.lognormal(0, 0.05, (3, 60))
    fast[1, 7] = 50.0
    ratio = s.time_ratio(s.Timings(slow.tolist()), s.Timings(fast.tolist()), 0.95, 1000, 0)
    assert ratio.value == pytest.approx(0.1, rel=0.03)
    # A round with a hiccup may be drawn twice, so the upper end may see it; the lower end must not move.
    assert ratio.low == pytest.approx(0.1, rel=0.06) and ratio.low < ratio.value < ratio.high
    assert ratio.reduction().low == 1 - ratio.high
    with pytest.raises(ValueError, match="same rounds"):
        s.time_ratio(s.Timings([[1.0]]), s.Timings([[1.0, 2.0]]), 0.95, 10, 0)


def test_time_quantiles() -> None:
    timings = s.Timings([[float(i) for i in range(1, 101)]] * 3)
    assert s.time_quantile(timings, 0.5, 0.95, 500, 0).value == pytest.approx(50.5)
    p95 = s.time_quantile(timings, 0.95, 0.95, 500, 0)
    assert p95.low < p95.value < p95.high
    assert s.time_quantile(timings, None, 0.95, 500, 0).value == pytest.approx(50.5)


def test_one_measurement_has_no_spread() -> None:
    assert s.spread([5.0]) == (5.0, None, None)
    assert s.spread([4.0, 6.0]) == (5.0, 4.0, 6.0)


# Gates


@pytest.mark.parametrize(
    ("low", "high", "at_least", "at_most", "verdict"),
    [
        (0.90, 0.95, 0.90, None, "passed"),
        (0.85, 0.89, 0.90, None, "failed"),
        (0.85, 0.90, 0.90, None, "undecided"),
        (3.0, 5.0, None, 5.0, "passed"),
        (5.1, 6.0, None, 5.0, "failed"),
        (4.0, 6.0, None, 5.0, "undecided"),
        (None, None, 0.9, None, "undecided"),
    ],
)
def test_verdicts(
    low: float | None, high: float | None, at_least: float | None, at_most: float | None, verdict: str
) -> None:
    assert judge(low, high, at_least=at_least, at_most=at_most) == verdict


@given(st.floats(0, 1), st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0, 1), st.floats(0, 1))
def test_a_narrower_interval_never_turns_a_verdict(
    value: float, down: float, up: float, shrink: float, bound: float
) -> None:
    wide = judge(value - down, value + up, at_least=bound, at_most=None)
    narrow = judge(value - shrink * down, value + shrink * up, at_least=bound, at_most=None)
    assert wide in ("undecided", narrow)


def test_needed_examples() -> None:
    # The lower end has to come from 4 points below to 2: four times the examples, three times as many more.
    assert needed(0.92, 0.88, 0.96, 500, at_least=0.90) == Need(1500)
    assert needed(0.89, 0.85, 0.91, 500, at_least=0.90) == Need(1500)
    assert needed(4.9, 4.0, 6.0, 50, at_most=5.0).count > 50
    assert needed(0.9, 0.88, 0.92, 500, at_least=0.90) == Need(50_000, more_than=True)
    assert str(needed(0.9, 0.88, 0.92, 500, at_least=0.90)) == "more than 50,000"


def test_the_needed_examples_would_decide() -> None:
    n, hits, bound = 400, 366, 0.9
    low, high = s.wilson(hits, n, 0.95)
    more = needed(hits / n, low, high, n, at_least=bound).count
    again = s.wilson((n + more) * hits / n, n + more, 0.95)
    assert judge(low, high, at_least=bound, at_most=None) == "undecided"
    assert judge(*again, at_least=bound, at_most=None) == "passed"


def test_overall() -> None:
    assert overall([]) == "passed"
    assert overall(["passed", "undecided"]) == "undecided"
    assert overall(["passed", "undecided", "failed"]) == "failed"


# Coverage


@pytest.mark.slow
@pytest.mark.parametrize(("n", "right"), [(60, 0.97), (200, 0.9), (500, 0.995)])
def test_coverage_of_a_share(n: int, right: float) -> None:
    rng = np.random.default_rng(7)
    inside = 0
    for trial in range(300):
        interval = s.score_interval(share(rng.random(n) < right), s.Bootstrap(n, 400, trial), 0.95)
        inside += interval.low <= right <= interval.high
    assert 0.93 <= inside / 300 <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("n", "first", "second"), [(100, 0.97, 0.95), (300, 0.92, 0.90), (800, 0.95, 0.95)])
def test_coverage_of_a_paired_difference_and_ratio(n: int, first: float, second: float) -> None:
    rng = np.random.default_rng(11)
    inside = ratio_inside = 0
    for trial in range(300):
        hard = rng.random(n)
        other = np.where(rng.random(n) < 0.3, rng.random(n), hard)
        paired = s.compare_scores(share(hard < first), share(other < second), s.Bootstrap(n, 400, trial), 0.95)
        inside += paired.difference.low <= second - first <= paired.difference.high
        assert paired.ratio is not None
        ratio_inside += paired.ratio.low <= second / first <= paired.ratio.high
    assert 0.93 <= inside / 300 <= 1.0
    assert 0.93 <= ratio_inside / 300 <= 1.0


@pytest.mark.slow
def test_coverage_of_macro_f1_differences() -> None:
    rng = np.random.default_rng(5)
    labels = np.array(list("abcdefgh"))

    def answers(golds: np.ndarray, right: float) -> np.ndarray:
        return np.where(rng.random(len(golds)) < right, golds, rng.choice(labels, len(golds)))

    def draw(n: int) -> tuple[s.MacroF1Score, s.MacroF1Score]:
        golds = rng.choice(labels, n, p=[0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05])
        return s.MacroF1Score(golds.tolist(), answers(golds, 0.85).tolist()), s.MacroF1Score(
            golds.tolist(), answers(golds, 0.9).tolist()
        )

    large = draw(400_000)
    truth = large[1].value - large[0].value
    inside = 0
    for trial in range(300):
        paired = s.compare_scores(*draw(400), s.Bootstrap(400, 400, trial), 0.95)
        inside += paired.difference.low <= truth <= paired.difference.high
    assert 0.915 <= inside / 300 <= 0.985


@pytest.mark.slow
def test_a_difference_that_is_not_there_is_seldom_found() -> None:
    rng = np.random.default_rng(2)
    found = 0
    for trial in range(400):
        first, second = rng.random(300) < 0.9, rng.random(300) < 0.9
        paired = s.compare_scores(share(first), share(second), s.Bootstrap(300, 300, trial), 0.95)
        found += not paired.difference.low <= 0 <= paired.difference.high
    assert found / 400 <= 0.07
    assert binom.sf(found - 1, 400, 0.05) > 0.01
