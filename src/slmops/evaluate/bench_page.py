"""What `slmops bench` found, as one HTML file that needs nothing else. Pure: takes the dict that `slmops bench --json` prints."""

from __future__ import annotations

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
            ),
            _chart(
                found,
                f"Prompt tokens per second, {tokens}",
                "More is better.",
                _prompt(place, "prompt_tokens_per_s"),
                _rate,
            ),
        ]
        if found["settings"]["new_tokens"] > 1:
            about = "Tokens of the answer after the first; more is better."
            charts.append(
                _chart(found, f"New tokens per second, {tokens}", about, _prompt(place, "new_tokens_per_s"), _rate)
            )
    charts += [
        _chart(found, "Memory over the idle runtime", "Peak of the process, less that of one with a minimal model; less is better.",
               _one("over_idle_bytes"), words.size),
        _chart(found, "Memory", "Peak of the process; less is better.", _one("peak_bytes"), words.size),
        _chart(found, "Model file", "Less is better.", _one("model_bytes"), words.size),
    ]  # fmt: skip
    if all(model["joules_per_token"] is not None for model in found["models"].values()):
        about = "Of the processor packages, idle share included; less is better."
        charts.append(_chart(found, "Energy of a new token", about, _one("joules_per_token"), _millijoules))
    packages = ", ".join(f"{name} {version}" for name, version in found["environment"]["packages"].items())
    return environment.get_template("bench.html.j2").render(
        b=found, names=list(found["models"]), charts=charts, versions=packages, version=slmops.__version__
    )


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
