"""Inline SVG for the HTML report: dots with intervals, bars, curves. Pure functions of numbers.

Positions are percentages of the width and strokes do not scale, so a plot stays sharp and its lines thin at any width;
all words stand outside the drawings, as HTML. Every drawing has a text that says the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Axis:
    """A linear scale from `low` to `high` with ticks inside."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Position of a value, 0 to 100, kept inside the axis."""
        if self.high <= self.low:
            return 50.0
        return min(100.0, max(0.0, 100 * (value - self.low) / (self.high - self.low)))


def axis(values: Sequence[float], *, zero: bool = False, floor: float = -math.inf, ceiling: float = math.inf) -> Axis:
    """An axis that holds all values with a little air and has 3 to 6 round ticks.

    Args:
        zero: begin at 0.
        floor, ceiling: the axis does not reach beyond these (0 and 1 for shares).
    """
    least, most = (0.0 if zero else min(values)), max(values)
    air = 0.06 * (most - least) or 0.05 * abs(most) or 0.5
    low = 0.0 if zero else max(floor, least - air)
    high = min(ceiling, most + air) if ceiling > low else low + 1
    step = _step((high - low) / 4)
    first = math.ceil(low / step - 1e-9)
    ticks = [i * step for i in range(first, first + 12) if i * step <= high + 1e-9 * step]
    return Axis(low, high, tuple(ticks))


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / rough)))


def _svg(inside: str, label: str, height: int = 26) -> Markup:
    return Markup(
        f'<svg class="row" width="100%" height="{height}" role="img" aria-label="{escape(label)}">{inside}</svg>'
    )


def _grid(scale: Axis) -> str:
    return "".join(
        f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="100%"/>' for x in map(scale.at, scale.ticks)
    )


def dot(scale: Axis, value: float, low: float | None, high: float | None, kind: str, label: str) -> Markup:
    """A dot at a value, with a line from low to high. `kind` is a CSS class: teacher, student, baseline, shipped."""
    x, body = scale.at(value), _grid(scale)
    if low is not None and high is not None:
        body += f'<line class="span {kind}" x1="{scale.at(low):.2f}%" x2="{scale.at(high):.2f}%" y1="13" y2="13"/>'
        for end in (low, high):
            at = scale.at(end)
            body += f'<line class="cap {kind}" x1="{at:.2f}%" x2="{at:.2f}%" y1="9" y2="17"/>'
    return _svg(f'{body}<circle class="dot {kind}" cx="{x:.2f}%" cy="13" r="5"/>', label)


def bar(
    scale: Axis, value: float, kind: str, label: str, *,
    low: float | None = None, high: float | None = None, reach: float | None = None, mark: float | None = None,
) -> Markup:  # fmt: skip
    """A bar from the axis' start to a value.

    Args:
        low, high: ends of an interval drawn over the bar's end.
        reach: a thin bar goes on to here (a 95 % quantile).
        mark: a notch inside (the time to the first token).
    """
    body = _grid(scale)
    if reach is not None:
        body += f'<rect class="reach {kind}" x="0" y="10" height="6" width="{scale.at(reach):.2f}%"/>'
    body += f'<rect class="bar {kind}" x="0" y="6" height="14" width="{max(0.4, scale.at(value)):.2f}%"/>'
    if mark is not None:
        body += f'<line class="mark" x1="{scale.at(mark):.2f}%" x2="{scale.at(mark):.2f}%" y1="6" y2="20"/>'
    if low is not None and high is not None and high > low:
        body += f'<line class="whisker" x1="{scale.at(low):.2f}%" x2="{scale.at(high):.2f}%" y1="13" y2="13"/>'
    return _svg(body, label)


def ticks(scale: Axis, words: Sequence[str]) -> Markup:
    """The axis' tick labels as positioned HTML; labels too close to an edge lean inwards."""
    out = []
    for value, word in zip(scale.ticks, words, strict=True):
        x = scale.at(value)
        shift = 0 if x < 4 else 100 if x > 96 else 50
        out.append(f'<span style="left:{x:.2f}%;transform:translateX(-{shift}%)">{escape(word)}</span>')
    return Markup(f'<div class="ticks" aria-hidden="true">{"".join(out)}</div>')


Curve = Sequence[tuple[float, float]]
LEAST = 1e-4


def curves(train: Curve, validation: Curve, best: float | None, bounds: tuple[float, float], label: str) -> Markup:
    """Training and validation loss over steps, the loss on a log scale between `bounds`, both above 0."""
    last = max([x for x, _ in (*train, *validation)], default=1) or 1
    low, high = math.log(max(bounds[0], LEAST)), math.log(max(bounds[1], 2 * LEAST))

    def line(points: Curve, kind: str) -> str:
        if not points:
            return ""
        path = " ".join(
            f"{100 * x / last:.2f},{100 * (1 - (math.log(max(y, LEAST)) - low) / ((high - low) or 1)):.2f}"
            for x, y in points
        )
        return f'<polyline class="{kind}" points="{path}"/>'

    body = "".join(f'<line class="grid" x1="0" x2="100" y1="{y}" y2="{y}"/>' for y in (0, 50, 100))
    if best is not None:
        x = min(100.0, 100 * best / last)
        body += f'<line class="best" x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="100"/>'
    body += line(train, "train") + line(validation, "validation")
    return Markup(
        f'<svg class="curve" viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{body}</svg>'
    )


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot; `kind` is a CSS class: shipped (the best), student, faint."""

    x: float
    y: float
    kind: str
    label: str


def scatter(
    across: Axis, up: Axis, points: Sequence[Point], label: str, line: Sequence[tuple[float, float]] = ()
) -> Markup:
    """Points on two linear scales, the kind `shipped` on top, with a line through other places behind them."""
    body = _grid(across)
    body += "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>' for y in (100 - up.at(t) for t in up.ticks)
    )
    for (x1, y1), (x2, y2) in itertools.pairwise(line):
        body += (
            f'<line class="trend" x1="{across.at(x1):.2f}%" x2="{across.at(x2):.2f}%" '
            f'y1="{100 - up.at(y1):.2f}%" y2="{100 - up.at(y2):.2f}%"/>'
        )
    for point in sorted(points, key=lambda p: p.kind == "shipped"):
        radius = 5 if point.kind == "shipped" else 4
        body += (
            f'<circle class="dot {point.kind}" cx="{across.at(point.x):.2f}%" cy="{100 - up.at(point.y):.2f}%" '
            f'r="{radius}"><title>{escape(point.label)}</title></circle>'
        )
    return Markup(
        f'<svg class="scatter" width="100%" height="176" role="img" aria-label="{escape(label)}">{body}</svg>'
    )


@dataclass(frozen=True)
class Series:
    """A named line of points (x, y, low, high); `low` and `high` are the ends of an upright stroke."""

    name: str
    points: Sequence[tuple[float, float, float, float]]


STYLES = 6
"""Looks of lines that can be told apart: the CSS classes `s0` and so on, which come round again after the last."""


def lines(across: Axis, up: Axis, series: Sequence[Series], label: str) -> Markup:
    """Lines through points on two scales, each in a look of its own."""
    body = _grid(across)
    body += "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>' for y in (100 - up.at(t) for t in up.ticks)
    )
    for place, one in enumerate(series):
        look = f"s{place % STYLES}"
        spots = [(across.at(x), 100 - up.at(y), 100 - up.at(low), 100 - up.at(high)) for x, y, low, high in one.points]
        for (x1, y1, *_), (x2, y2, *_) in itertools.pairwise(spots):
            body += f'<line class="thread {look}" x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y1:.2f}%" y2="{y2:.2f}%"/>'
        for x, y, low, high in spots:
            body += f'<line class="reach {look}" x1="{x:.2f}%" x2="{x:.2f}%" y1="{low:.2f}%" y2="{high:.2f}%"/>'
            body += f'<circle class="dot {look}" cx="{x:.2f}%" cy="{y:.2f}%" r="4"/>'
    return Markup(
        f'<svg class="scatter" width="100%" height="240" role="img" aria-label="{escape(label)}">{body}</svg>'
    )


def levels(scale: Axis, words: Sequence[str]) -> Markup:
    """The tick labels of an upright axis as positioned HTML."""
    out = [
        f'<span style="top:{100 - scale.at(value):.2f}%">{escape(word)}</span>'
        for value, word in zip(scale.ticks, words, strict=True)
    ]
    return Markup(f'<div class="levels" aria-hidden="true">{"".join(out)}</div>')
