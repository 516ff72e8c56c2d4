"""`slmops compare A B`: two sets of answers to the same examples, paired, as a dict and as text.

The same statistics as in reports: interval of the difference, McNemar's test, and what this test set could show at
all. Which examples changed, in each direction, is told too. Nothing here says that a difference matters, only whether
it was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.core.spec import Metric, Task
from slmops.errors import UsageError
from slmops.evaluate.words import inside, interval, percent, points, probability, title

SHOWN = 10
TESTS = {"mcnemar_exact": "exact McNemar test", "bootstrap": "paired bootstrap"}


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: how it is called in the result.
        predictions: a folder or file that evaluate.predict wrote.
        measurement: a folder or file that evaluate.measure wrote, if there is one.
        variant: which variant of the measurement it is; default: `name`.
    """

    name: str
    predictions: Path
    measurement: Path | None = None
    variant: str | None = None


def compare(
    reference: Side, candidate: Side, task: Task, *,
    metric: Metric | None = None, confidence: float = 0.95, resamples: int = 2000, seed: int = 0, shown: int = SHOWN,
) -> dict[str, Any]:  # fmt: skip
    """The candidate against the reference.

    Args:
        metric: what they are compared by; default: the first metric of the task.
        shown: changed examples to list in each direction.

    Returns:
        JSON values: `reference`, `candidate`, `metric`, `n`, `confidence`, `scores` (metric to name to value, low and
        high), `difference` (as in report.json), `verdict` (better, worse, no difference found), `says`, `gained` and
        `lost` (`count`, `examples`), `time_reduction`, `memory_reduction` (value, low, high), `notes`.

    Raises:
        DataError: a file is broken, or the two answered different examples.
        UsageError: the metric does not fit the task, or both sides have the same name.
    """
    from slmops.evaluate import statistics as s
    from slmops.evaluate.assess import difference_of, score_of
    from slmops.evaluate.inputs import read_predictions, same_examples
    from slmops.evaluate.metrics import metrics_for

    if reference.name == candidate.name:
        raise UsageError(f"both sides are called {reference.name}", "give two different variants or runs")
    metrics = metrics_for(task, (metric,) if metric else None)
    rows = {side.name: read_predictions(side.predictions) for side in (reference, candidate)}
    first, second = rows[reference.name], rows[candidate.name]
    same_examples(reference.name, first, candidate.name, second)
    labels = task.labels or sorted({row.gold.strip() for row in first})
    bootstrap = s.Bootstrap(len(first), resamples, seed)
    scores: dict[str, dict[str, Any]] = {}
    for each in metrics:
        scores[each] = {}
        for name, answers in rows.items():
            found = s.score_interval(score_of(answers, each, task, labels), bootstrap, confidence)
            known = found.value == found.value
            scores[each][name] = {k: getattr(found, k) if known else None for k in ("value", "low", "high")}
    main = metrics[0]
    paired = s.compare_scores(
        score_of(first, main, task, labels), score_of(second, main, task, labels), bootstrap, confidence
    )
    difference = difference_of(paired, main, len(first)).model_dump(mode="json")
    verdict = "better" if difference["low"] > 0 else "worse" if difference["high"] < 0 else "no difference found"
    per_example: Metric = "accuracy" if main == "macro_f1" else main
    parts = [score_of(answers, per_example, task, labels) for answers in (first, second)]
    assert isinstance(parts[0], s.RatioScore) and isinstance(parts[1], s.RatioScore)
    quality = [_quality(part) for part in parts]
    changed = {
        "gained": [i for i in range(len(first)) if quality[1][i] > quality[0][i]],
        "lost": [i for i in range(len(first)) if quality[1][i] < quality[0][i]],
    }
    result: dict[str, Any] = {
        "reference": reference.name, "candidate": candidate.name, "metric": main, "n": len(first),
        "confidence": confidence, "scores": scores, "difference": difference, "verdict": verdict,
        "says": _says(reference.name, candidate.name, main, difference, verdict),
    }  # fmt: skip
    for direction, found_ in changed.items():
        examples = [
            {"id": first[i].id, "prompt": first[i].prompt, "gold": first[i].gold, "reference": first[i].answer,
             "candidate": second[i].answer}
            for i in sorted(found_, key=lambda i: first[i].id)[:shown]
        ]  # fmt: skip
        result[direction] = {"count": len(found_), "examples": examples}
    return result | _measured(reference, candidate, confidence, resamples, seed)


def _quality(score: Any) -> list[float]:
    return [a / b if b else 1.0 for a, b in zip(score.above, score.below, strict=True)]


def _measured(reference: Side, candidate: Side, confidence: float, resamples: int, seed: int) -> dict[str, Any]:
    from slmops.evaluate import statistics as s
    from slmops.evaluate.assess import memory_ratio
    from slmops.evaluate.inputs import read_measurement

    unknown = {"value": None, "low": None, "high": None}
    out: dict[str, Any] = {"time_reduction": unknown, "memory_reduction": unknown, "notes": []}
    if reference.measurement is None or candidate.measurement is None:
        return out
    files = read_measurement(reference.measurement), read_measurement(candidate.measurement)
    before = files[0].variants.get(reference.variant or reference.name)
    after = files[1].variants.get(candidate.variant or candidate.name)
    if before is None or after is None:
        out["notes"].append("Time and memory are not compared: one side was not measured.")
        return out
    if reference.measurement != candidate.measurement:
        out["notes"].append("Time and memory were measured in two runs: the state of the machine may differ.")
        if (files[0].threads, files[0].environment.get("cpu")) != (files[1].threads, files[1].environment.get("cpu")):
            out["notes"].append("The two runs used other processors or threads.")
    shapes = [(len(x.total_s), len(x.total_s[0]) if x.total_s else 0) for x in (before, after)]
    if files[0].prompt_ids == files[1].prompt_ids and shapes[0] == shapes[1] and all(shapes[0]):
        ratio = s.time_ratio(s.Timings(before.total_s), s.Timings(after.total_s), confidence, resamples, seed)
        reduction = ratio.reduction()
        out["time_reduction"] = {"value": reduction.value, "low": reduction.low, "high": reduction.high}
    else:
        out["notes"].append("Time is not compared: the two were timed on different prompts or rounds.")
    out["memory_reduction"] = memory_ratio(before.over_baseline, after.over_baseline).model_dump(mode="json")
    return out


def _says(reference: str, candidate: str, metric: str, difference: Mapping[str, Any], verdict: str) -> str:
    ends = f"{points(difference['low'])} to {points(difference['high'])}"
    by = f"{inside(metric)} by {points(difference['value'])} points ({ends})"
    if verdict == "no difference found":
        see = points(difference["detectable"]).lstrip("+")
        return (
            f"{candidate} changes {by}: no difference found. These {difference['n']:,} examples would show one of {see} "
            "points or more."
        )
    return f"{candidate} is {verdict} than {reference}: it changes {by}."


def render_comparison(result: Mapping[str, Any]) -> str:
    """The result of `compare` for the terminal."""
    first, second = result["reference"], result["candidate"]
    d = result["difference"]
    width = max(len(title(metric)) for metric in result["scores"])
    wide = max(len(first), len(second), 23)
    lines = [result["says"], "", f"  {'':<{width}}  {first:<{wide}}  {second:<{wide}}".rstrip()]
    for metric, sides in result["scores"].items():
        cells = [
            f"{percent(sides[name]['value'])} ({interval(metric, sides[name])})"
            if sides[name]["value"] is not None
            else "–"
            for name in (first, second)
        ]
        lines.append(f"  {title(metric):<{width}}  {cells[0]:<{wide}}  {cells[1]:<{wide}}".rstrip())
    lines += ["", f"  p {probability(d['p'])} ({TESTS[d['test']]}), {d['n']:,} examples"]
    for key, name in (("time_reduction", "time per response"), ("memory_reduction", "memory")):
        estimate = result[key]
        if estimate["value"] is not None:
            ends = interval("memory_reduction", estimate)
            lines.append(f"  {name}: {points(-estimate['value'])} %" + (f" ({ends})" if ends else ""))
    lines += [f"  {note}" for note in result["notes"]]
    for direction, word in (("lost", "worse"), ("gained", "better")):
        lines += _examples(result[direction], f"{word} with {second}", (first, second))
    return "\n".join(lines) + "\n"


def _examples(changed: Mapping[str, Any], head: str, names: Sequence[str]) -> list[str]:
    if not changed["count"]:
        return ["", f"No example is {head}."]
    count = changed["count"]
    shown = len(changed["examples"])
    some = f", {shown} of them:" if shown < count else ":"
    lines = ["", f"{count:,} example{'' if count == 1 else 's'} {'is' if count == 1 else 'are'} {head}{some}"]
    for e in changed["examples"]:
        lines.append(f"  {_line(e['prompt'], 94)}")
        answers = (("gold", e["gold"]), (names[0], e["reference"]), (names[1], e["candidate"]))
        lines += [f"      {name}: {_line(text, 88 - len(name))}" for name, text in answers]
    return lines


def _line(text: str, most: int) -> str:
    flat = " ".join(text.split()) or "(nothing)"
    return flat if len(flat) <= most else flat[: most - 1] + "…"
