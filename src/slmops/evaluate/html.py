"""A report as one HTML file that needs nothing else: no script, no font, no address outside. Pure.

`render_html` takes the dict that report.json holds. All text of the report is escaped; the page forbids itself to load
or run anything. What the page looks like is `templates/report.html.j2`; the drawings are `plots`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slmops.evaluate import pages, plots, words
from slmops.evaluate.text import STEPS, hop_rows
from slmops.evaluate.words import NOUNS

Json = Mapping[str, Any]
Row = dict[str, Any]
WORDS = {"passed": "Passed", "failed": "Failed", "undecided": "Undecided"}
UNDER_HEADLINE = {
    "inference_time_reduction": "time per response",
    "memory_reduction": "resident memory",
    "accuracy_retained": "of the teacher’s score",
    "size_reduction_vs_fp32": "model file",
    "size_reduction_vs_fp16": "model file",
}


FILES = {
    "teacher": "gold for the teacher",
    "gold": "gold for the student",
    "pool": "without a label",
    "oracle": "gold in all",
}
KINDS = {
    "train_exact": "exact copies of evaluation data",
    "train_near": "near copies of evaluation data",
    "train_ngram": "sharing a long run of words with evaluation data",
    "validation_exact": "validation examples that are copies of test data",
    "validation_near": "validation examples that are near copies of test data",
    "validation_ngram": "validation examples that share a long run of words with test data",
    "duplicate": "copies of each other, merged",
    "conflict": "of those with another answer",
    "limit": "over data.max_examples",
}


def render_html(report: Json) -> str:
    """The page for a report (the parsed content of report.json).

    Raises:
        KeyError: the dict is not a report of this schema.
    """
    environment = pages.environment()
    environment.filters |= {
        "percent": words.percent, "points": words.points, "ms": words.milliseconds, "size": words.size,
        "p": words.probability, "title": words.title, "fact": _fact, "label": _label, "counted": _counted,
        "plain": _plain,
    }  # fmt: skip
    environment.globals |= {
        "shown": words.shown,
        "bound": words.bound,
        "interval": words.interval,
        "steps": STEPS,
        "nouns": NOUNS,
        "files": FILES,
        "kinds": KINDS,
    }
    shipped = report["subject"]["variant"]
    variants = {v["name"]: v for v in report["variants"]}
    return environment.get_template("report.html.j2").render(
        r=report,
        word=WORDS[report["verdict"]] if report["gates"] else "No gates",
        tone=report["verdict"] if report["gates"] else "none",
        under=UNDER_HEADLINE,
        shipped=variants[shipped],
        metrics=list(variants[shipped]["scores"]),
        accuracy=_accuracy(report),
        latency=_latency(report),
        memory=_bars(report, lambda v: (v["memory"] or {}).get("over_baseline_bytes"), "memory"),
        sizes=_bars(report, lambda v: {"value": v["file_bytes"], "low": None, "high": None}, "model file"),
        curves=_curves(report),
        hops=hop_rows(report.get("hops", ())),
        least={hop["expects"]: hop["at_least"] for hop in report.get("hops", ())},
        broken=[hop["says"] for hop in report.get("hops", ()) if hop["broke"]],
        baselines=[b for b in report["no_teacher_baseline"].values() if b],
    )


def _label(name: str) -> str:
    return {"cpu": "CPU", "slmops": "slmops"}.get(name, name.replace("_", " ").capitalize())


def _plain(facts: Json) -> Row:
    return {name: value for name, value in facts.items() if isinstance(value, str | int | float)}


def _counted(counts: Mapping[str, int], names: Mapping[str, str]) -> str:
    return ", ".join(f"{count:,} {names.get(name, name.replace('_', ' '))}" for name, count in counts.items())


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_fact(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_fact(inner) for inner in value)
    return "–" if value is None else str(value)


def _kind(report: Json, variant: Json) -> str:
    return "shipped" if variant["name"] == report["subject"]["variant"] else str(variant["role"])


def _accuracy(report: Json) -> Row | None:
    metric = report["metric"]
    scored = [(v, v["scores"][metric]) for v in report["variants"] if v["scores"][metric]["value"] is not None]
    if not scored:
        return None
    ends = [e for _, s in scored for e in (s["value"], s["low"], s["high"]) if e is not None]
    scale = plots.axis(ends, floor=0.0, ceiling=1.0)
    rows = []
    for variant, score in scored:
        between = words.interval(metric, score)
        label = f"{variant['name']}: {words.percent(score['value'])}, interval {between}"
        drawing = plots.dot(scale, score["value"], score["low"], score["high"], _kind(report, variant), label)
        rows.append({"variant": variant, "drawing": drawing, "value": words.percent(score["value"]), "note": between})
    return _plot(report, rows, scale, lambda tick: words.percent(tick, 0))


def _plot(report: Json, rows: list[Row], scale: plots.Axis, word: Callable[[float], str]) -> Row:
    for row in rows:
        row["kind"] = _kind(report, row["variant"])
    return {"rows": rows, "ticks": plots.ticks(scale, [word(tick) for tick in scale.ticks]), "zero": scale.low == 0}


def _latency(report: Json) -> Row | None:
    timed = [v for v in report["variants"] if v["latency"]]
    if not timed:
        return None
    scale = plots.axis([v["latency"]["p95_ms"]["value"] for v in timed], zero=True)
    rows = []
    for variant in timed:
        p50, p95, first = (variant["latency"][k]["value"] for k in ("p50_ms", "p95_ms", "first_token_p50_ms"))
        ms = words.milliseconds
        label = f"{variant['name']}: half within {ms(p50)}, 95 % within {ms(p95)}, first token at {ms(first)}"
        drawing = plots.bar(scale, p50, _kind(report, variant), label, reach=p95, mark=first)
        rows.append({"variant": variant, "drawing": drawing, "value": ms(p50), "note": f"95 % within {ms(p95)}"})
    return _plot(report, rows, scale, lambda tick: "0" if tick == 0 else f"{tick:g} ms")


def _bars(report: Json, pick: Callable[[Json], Json | None], what: str) -> Row | None:
    found = [(v, e) for v in report["variants"] if (e := pick(v)) is not None and e["value"] is not None]
    if not found:
        return None
    scale = plots.axis([max(e["value"], e["high"] or 0, 1.0) for _, e in found], zero=True)
    rows = []
    for variant, estimate in found:
        value, low, high = estimate["value"], estimate["low"], estimate["high"]
        note = f"{words.size(low)} to {words.size(high)}" if low is not None else ""
        label = f"{variant['name']}: {what} {words.size(value)}"
        drawing = plots.bar(scale, value, _kind(report, variant), label, low=low, high=high)
        rows.append({"variant": variant, "drawing": drawing, "value": words.size(value), "note": note})
    return _plot(report, rows, scale, lambda tick: "0" if tick == 0 else words.size(tick).replace(".0 ", " "))


def _curves(report: Json) -> list[Row]:
    losses = [p["loss"] for t in report["training"] for part in ("train", "validation") for p in t[part]]
    if not losses:
        return []
    bounds = max(min(losses), plots.LEAST), max(max(losses), 2 * plots.LEAST)
    out = []
    for training in report["training"]:
        train, validation = ([(p["step"], p["loss"]) for p in training[part]] for part in ("train", "validation"))
        if not train and not validation:
            continue
        last = max(step for step, _ in (*train, *validation))
        lines = (("training", train), ("validation", validation))
        ends = [f"{kind} loss ends at {line[-1][1]:.3g}" for kind, line in lines if line]
        label = f"{training['name']}: {', '.join(ends)} after {last:,} steps"
        drawing = plots.curves(train, validation, training["best_step"], bounds, label)
        out.append({"name": training["name"], "drawing": drawing, "last": last, "best": training["best_step"],
                    "low": f"{bounds[0]:.2g}", "high": f"{bounds[1]:.2g}", "ends": ends})  # fmt: skip
    return out
