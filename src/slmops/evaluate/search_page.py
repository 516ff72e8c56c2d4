"""A search as one HTML file that needs nothing else: what mattered, how it went, what was traded for what. Pure.

`render_search` takes the dict that `slmops search --json` prints. All text is escaped; the page loads and runs nothing.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import slmops
from slmops.evaluate import pages, plots, words

Json = Mapping[str, Any]
Row = dict[str, Any]
LOG_FROM = 2.5
"""An axis is logarithmic where the parameter is and its values span more than this factor."""

MOST_CHOICES = 12


def render_search(found: Json) -> str:
    """The page for a search (what `slmops search --json` prints).

    Raises:
        KeyError: the dict is not that.
    """
    environment = pages.environment()
    environment.filters |= {"metric": title, "value": number, "short": _short, "quote": shlex.quote}
    complete = [trial for trial in found["trials"] if trial["state"] == "complete"]
    counts = {state: sum(t["state"] == state for t in found["trials"]) for state in ("complete", "pruned", "failed")}
    return environment.get_template("search.html.j2").render(
        s=found,
        counts=counts,
        best=set(found["front"]),
        history=[_history(found, complete, i) for i in range(len(found["objectives"]))] if complete else [],
        importance=_importance(found),
        slices=[_slice(found, complete, key) for key in found["parameters"]] if complete else [],
        fronts=[_pair(found, complete, i) for i in range(1, len(found["objectives"]))] if complete else [],
        version=slmops.__version__,
    )


def title(metric: str) -> str:
    """An objective for people."""
    own = {
        "validation_loss": "Validation loss, nats per answer",
        "file_mb": "Model file, MB",
        "parameters": "Parameters",
    }
    return own.get(metric) or words.title(metric)


def number(value: float | None, metric: str = "") -> str:
    """A value of an objective, or of a parameter where no metric is given."""
    if value is None:
        return "–"
    if metric == "parameters" or (not metric and isinstance(value, int)):
        return f"{value:,.0f}"
    if metric in ("", "validation_loss", "file_mb"):
        return f"{value:.4g}"
    return words.percent(value)


def _short(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _kind(found: Json, trial: Json) -> str:
    return "shipped" if trial["number"] in found["front"] else "student"


def _label(found: Json, trial: Json) -> str:
    parameters = ", ".join(f"{key} {_short(value)}" for key, value in trial["parameters"].items())
    values = [
        f"{title(o['metric'])} {number(v, o['metric'])}"
        for o, v in zip(found["objectives"], trial["values"], strict=True)
    ]
    return f"trial {trial['number']}: {', '.join(values)}; {parameters}"


def _up(found: Json, complete: Sequence[Json], index: int) -> tuple[plots.Axis, Any]:
    metric = found["objectives"][index]["metric"]
    values = [trial["values"][index] for trial in complete]
    share = metric not in ("validation_loss", "file_mb", "parameters")
    scale = plots.axis(values, floor=0.0, ceiling=1.0 if share else math.inf)
    tick = [words.percent(t, 0) if share and scale.high - scale.low > 0.05 else number(t, metric) for t in scale.ticks]
    return scale, plots.levels(scale, tick)


def _history(found: Json, complete: Sequence[Json], index: int) -> Row:
    """Values by trial, with the best so far."""
    objective = found["objectives"][index]
    up, levels = _up(found, complete, index)
    last = max(trial["number"] for trial in found["trials"])
    across = plots.Axis(
        -0.5, last + 0.5, tuple(float(t) for t in plots.axis([0, last or 1], zero=True).ticks if t == int(t))
    )
    better = max if objective["direction"] == "maximize" else min
    line: list[tuple[float, float]] = []
    for trial in complete:
        value = trial["values"][index]
        if line:
            line.append((trial["number"], line[-1][1]))
        line.append((trial["number"], better(line[-1][1], value) if line else value))
    points = [plots.Point(t["number"], t["values"][index], _kind(found, t), _label(found, t)) for t in complete]
    best = number(better(t["values"][index] for t in complete), objective["metric"])
    label = f"{title(objective['metric'])} of {len(complete)} trials by number; the best is {best}"
    return {
        "title": title(objective["metric"]), "levels": levels, "under": "trial",
        "drawing": plots.scatter(across, up, points, label, line),
        "ticks": plots.ticks(across, [f"{t:.0f}" for t in across.ticks]),
    }  # fmt: skip


def _importance(found: Json) -> list[Row]:
    shares: Mapping[str, float] = found["importance"]
    if not shares:
        return []
    scale = plots.axis([max(shares.values())], zero=True)
    return [
        {"name": key, "value": words.percent(share, 0),
         "drawing": plots.bar(scale, share, "shipped", f"{key}: {words.percent(share, 0)}")}
        for key, share in shares.items()
    ]  # fmt: skip


def _slice(found: Json, complete: Sequence[Json], key: str) -> Row:
    """One parameter against the first objective."""
    metric, about = found["objectives"][0]["metric"], found["parameters"][key]
    up, levels = _up(found, complete, 0)
    given = [trial["parameters"][key] for trial in complete]
    places: list[float]
    if about["numbers"]:
        log = about["log"] and max(given) > LOG_FROM * min(given)
        places = [math.log10(value) if log else float(value) for value in given]
        across = plots.axis(places)
        tick = [f"{10**t:.2g}" if log else f"{t:.4g}" for t in across.ticks]
    else:
        choices = [_short(value) for value in about["choices"]]
        places = [float(choices.index(_short(value))) for value in given]
        across = plots.Axis(-0.5, len(choices) - 0.5, tuple(float(i) for i in range(len(choices))))
        tick = [c if len(c) <= 18 and len(choices) <= MOST_CHOICES else str(i + 1) for i, c in enumerate(choices)]
    points = [
        plots.Point(x, t["values"][0], _kind(found, t), _label(found, t)) for x, t in zip(places, complete, strict=True)
    ]
    label = f"{title(metric)} against {key} for {len(complete)} trials"
    return {
        "title": key, "levels": levels, "drawing": plots.scatter(across, up, points, label),
        "ticks": plots.ticks(across, tick), "under": "",
    }  # fmt: skip


def _pair(found: Json, complete: Sequence[Json], index: int) -> Row:
    """The first objective against another."""
    first, other = found["objectives"][0]["metric"], found["objectives"][index]["metric"]
    up, levels = _up(found, complete, 0)
    across = plots.axis([trial["values"][index] for trial in complete], floor=0.0)
    points = [plots.Point(t["values"][index], t["values"][0], _kind(found, t), _label(found, t)) for t in complete]
    line = sorted((p.x, p.y) for p in points if p.kind == "shipped") if len(found["objectives"]) == 2 else []
    label = f"{title(first)} against {title(other)}; {len(found['front'])} trials are beaten by none"
    return {
        "title": f"{title(first)} against {title(other)[0].lower()}{title(other)[1:]}", "levels": levels, "under": title(other),
        "drawing": plots.scatter(across, up, points, label, line),
        "ticks": plots.ticks(across, [number(t, other) for t in across.ticks]),
    }  # fmt: skip
