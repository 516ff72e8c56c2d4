"""What `slmops bench` found, as one HTML file that needs nothing else. Pure: takes the dict that `slmops bench --json` prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import slmops
from slmops.evaluate import pages, plots, words

Json = Mapping[str, Any]


def render_bench(found: Json) -> str:
    """The page.

    Raises:
        KeyError: the dict is not that of `slmops bench`.
    """
    environment = pages.environment()
    batches = found["settings"]["batches"]
    together = [_together(found, place) for place in range(len(found["settings"]["prompt_tokens"]))] if batches else []
    charts = []
    for place, length in enumerate(found["settings"]["prompt_tokens"]):
        tokens = f"prompts of {length} tokens"
        charts += [
            _chart(
                found,
                f"Time to the first token, {tokens}",
                "Less is better.",
                _prompt(place, "first_token_s"),
                _milliseconds,
            )
        ]
        if batches:  # the rest is in the drawings above
            continue
        title = f"Prompt tokens per second, {tokens}"
        charts.append(_chart(found, title, "More is better.", _prompt(place, "prompt_tokens_per_s"), _rate))
        if found["settings"]["new_tokens"] > 1:
            about = "Tokens of the answer after the first; more is better."
            charts.append(
                _chart(found, f"New tokens per second, {tokens}", about, _prompt(place, "new_tokens_per_s"), _rate)
            )
    charts += [
        _chart(found, "Memory over the idle runtime", "Peak of the process, less that of one with a minimal model; less is better.",
               _one("over_idle_bytes"), words.size),
        _chart(found, "Memory", "Peak of the process; less is better.", _one("peak_bytes"), words.size),
        _chart(_files(found), "Model file", "Less is better.", _one("model_bytes"), words.size),
    ]  # fmt: skip
    if all(model["joules_per_token"] is not None for model in found["models"].values()):
        about = "Of the processor packages, idle share included; less is better."
        charts.append(_chart(found, "Energy of a new token", about, _one("joules_per_token"), _millijoules))
    packages = ", ".join(f"{name} {version}" for name, version in found["environment"]["packages"].items())
    return environment.get_template("bench.html.j2").render(
        b=found, names=list(dict.fromkeys(model["of"] for model in found["models"].values())), charts=charts, together=together,
        versions=packages, version=slmops.__version__,
    )  # fmt: skip


def _files(found: Json) -> Json:
    """Each model once, whatever its batches."""
    return {"models": {model["of"]: model for model in found["models"].values()}}


def _together(found: Json, place: int) -> dict[str, Any]:
    """What several answers at once bring with prompts of one length: a drawing over the batches, and the numbers in a table."""
    new = found["settings"]["new_tokens"] > 1
    key, title = ("new_tokens_per_s", "New tokens per second") if new else ("answers_per_s", "Answers per second")
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    rows = []
    for model in found["models"].values():
        prompt = model["prompts"][place]
        rate, times = prompt[key], prompt["speed_up"]
        points = series.setdefault(model["of"], [])
        aside = 0.03 * (len(series) - 1)  # so that strokes do not cover each other
        points.append((math.log2(model["batch"]) + aside, rate["value"], rate["low"], rate["high"]))
        rows.append({
            "name": model["of"], "new": not points[1:], "batch": model["batch"], "memory": words.size(model["peak_bytes"]),
            "first": _milliseconds(prompt["first_token_s"]["value"]), "answers": f"{prompt['answers_per_s']['value']:,.1f}",
            "all": _rate(rate["value"]) if new else "–", "each": _rate(rate["value"] / model["batch"]) if new else "–",
            "range": f"{_rate(rate['low'])} to {_rate(rate['high'])}" if new else "–",
            "times": f"× {times['value']:.2f}" if times else "–",
        })  # fmt: skip
    length = found["settings"]["prompt_tokens"][place]
    made: dict[str, Any] = {
        "title": f"{title} over answers at once, prompts of {length} tokens",
        "rows": rows,
        "drawing": None,
    }
    batches = found["settings"]["batches"]
    if len(batches) > 1:
        steps = [math.log2(batch) for batch in batches]
        air = 0.05 * (steps[-1] - steps[0])
        across = plots.Axis(steps[0] - air, steps[-1] + air, tuple(steps))
        up = plots.axis([high for points in series.values() for *_, high in points], zero=True)
        lines = [plots.Series(name, points) for name, points in series.items()]
        made |= {
            "drawing": plots.lines(across, up, lines, f"{made['title']}; the table says the same"),
            "ticks": plots.ticks(across, [f"{batch}" for batch in batches]),
            "levels": plots.levels(up, [_rate(tick) for tick in up.ticks]),
            "keys": [(one.name, f"s{place % plots.STYLES}") for place, one in enumerate(lines)],
        }
    return made


def _prompt(place: int, key: str) -> Callable[[Json], Json]:
    return lambda model: model["prompts"][place][key]


def _one(key: str) -> Callable[[Json], Json]:
    return lambda model: {"value": model[key], "low": None, "high": None}


def _chart(
    found: Json, title: str, about: str, of: Callable[[Json], Json], show: Callable[[float], str]
) -> dict[str, Any]:
    values = {name: of(model) for name, model in found["models"].items()}
    scale = plots.axis([v["high"] if v["high"] is not None else v["value"] for v in values.values()], zero=True)
    rows = []
    for name, v in values.items():
        between = f"{show(v['low'])} to {show(v['high'])}" if v["low"] is not None and v["high"] > v["low"] else ""
        label = f"{name}: {show(v['value'])}{f', {between}' if between else ''}"
        drawing = plots.bar(scale, v["value"], "student", label, low=v["low"], high=v["high"])
        rows.append({"name": name, "value": show(v["value"]), "range": between, "drawing": drawing})
    return {"title": title, "about": about, "rows": rows}


def _milliseconds(value: float) -> str:
    return words.milliseconds(1000 * value)


def _millijoules(value: float) -> str:
    return f"{1000 * value:.1f} mJ"


def _rate(value: float) -> str:
    return f"{value:,.0f}"
