"""What `slmops fit` found, as one HTML file that needs nothing else. Pure: takes the dict that `slmops fit --json` prints."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

import slmops
from slmops.evaluate import pages, plots, words
from slmops.evaluate.fit_text import finding, fit_rows

Json = Mapping[str, Any]


def render_fit(found: Json) -> str:
    """The page.

    Raises:
        KeyError: the dict is not that of `slmops fit`.
    """
    environment = pages.environment()
    possible = [row for row in found["candidates"] if row["state"] != "impossible"]
    return environment.get_template("fit.html.j2").render(
        f=found, rows=fit_rows(possible, found["front"]), version=slmops.__version__,
        charts=[
            chart for key, title, show in (
                ("file_bytes", "Score against model file", words.size), ("p95_s", "Score against time", _milliseconds)
            ) if (chart := _chart(found, key, title, show)) is not None
        ],
    )  # fmt: skip


def _milliseconds(value: float) -> str:
    return words.milliseconds(1000 * value)


def _chart(found: Json, key: str, title: str, show: Any) -> dict[str, Any] | None:
    rows = [row for row in found["candidates"] if row["score"] is not None and row[key] is not None]
    if len(rows) < 2:
        return None
    across = plots.axis([row[key] for row in rows], zero=True)
    up = plots.axis([row["score"] for row in rows], floor=0.0, ceiling=1.0)
    points = [
        plots.Point(
            row[key], row["score"], "shipped" if row["state"] == "chosen" else "student" if row["name"] in found["front"] else "faint",
            f"{row['name']}: {show(row[key])}, {words.percent(row['score'])}, {finding(row)}",
        )
        for row in rows
    ]  # fmt: skip
    line: list[tuple[float, float]] = []  # what no other beats in these two
    for x, y in sorted(
        (row[key], row["score"]) for row in rows if row["state"] != "quality" or row["low"] == row["high"]
    ):
        if not line or y > line[-1][1]:
            line.append((x, y))
    drawing: Markup = plots.scatter(across, up, points, title, line)
    ticks = plots.ticks(across, ["0" if tick == 0 else show(tick).replace(".0 ", " ") for tick in across.ticks])
    return {
        "title": title,
        "drawing": drawing,
        "ticks": ticks,
        "levels": plots.levels(up, [words.percent(t, _digits(up.ticks)) for t in up.ticks]),
    }


def _digits(ticks: Sequence[float]) -> int:
    """Digits of a per cent that tell the ticks apart."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    return next((digits for digits in range(4) if 100 * step >= 0.99 * 10**-digits), 4)
