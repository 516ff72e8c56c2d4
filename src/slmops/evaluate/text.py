"""A report as plain text for the terminal: `slmops report`. Pure; takes the dict that report.json holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from slmops.core.layout import columns
from slmops.evaluate.words import bound, interval, milliseconds, percent, points, probability, shown, size, title

Json = Mapping[str, Any]
WORDS = {"passed": "PASSED", "failed": "FAILED", "undecided": "UNDECIDED"}
STEPS = {
    "distilling": "distilling alone",
    "quantising": "quantising alone",
    "pruning": "pruning alone",
    "trimming": "trimming the vocabulary alone",
    "calibrating": "rounding on training texts alone",
    "both": "both",
    "as_shipped": "against the teacher as it runs today",
}

FOUND = {
    "": "kept",
    "template": "broke the chat template",
    "weights": "broke the weights",
    "nothing compared": "not compared",
}
"""What a hop did, in words."""


def render_text(report: Json) -> str:
    """The verdict, the headline, every variant, the deltas, the baselines and the gates, in at most 100 columns."""
    subject = report["subject"]
    head = f"{subject['name']} {subject['version']}: {subject['variant']}"
    lines = [head, f"{WORDS[report['verdict']]}  {report['says']}", ""]
    if not report["gates"]:
        lines[1] = f"NO GATES  {report['says']}"
    lines[2:2] = broken_lines(report.get("hops", ()))
    lines += [*_headline(report["headline"]), "", *_variants(report), ""]
    if report["comparisons"]:
        lines += [*_comparisons(report), ""]
    if report.get("hops"):
        lines += [*_table(hop_rows(report["hops"]), right=range(1, 5)), ""]
    baselines = [b for b in report["no_teacher_baseline"].values() if b]
    if baselines:
        lines += ["Without the teacher", *(f"  {line}" for b in baselines for line in _wrapped(b["says"], 96)), ""]
    if report["gates"]:
        lines += ["Gates", *(line for gate in report["gates"] for line in _gate(gate)), ""]
    if report["notes"]:
        lines += [*(f"Note: {note}" for note in report["notes"]), ""]
    sure = percent(report["confidence"], 0)
    lines += _wrapped(
        f"{report['n_test']:,} test examples; intervals at {sure}; scores by {title(report['metric'])}.", 98
    )
    return "\n".join(lines).rstrip() + "\n"


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    return [f"  {line}" for line in columns(rows, right)]


def _wrapped(text: str, width: int) -> list[str]:
    return wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _headline(headline: Json) -> list[str]:
    rows = []
    for name, figure in headline.items():
        value = shown(name, figure["value"]) if figure["value"] is not None else "not measured"
        rows.append((title(name), value, interval(name, figure) if figure["value"] is not None else ""))
    return _table(rows, right=(1,))


def _variants(report: Json) -> list[str]:
    metrics = list(report["variants"][0]["scores"])
    rows = [["", *(title(m) for m in metrics[:4]), "p50", "p95", "memory", "file"]]
    for variant in report["variants"]:
        latency, memory = variant["latency"] or {}, variant["memory"] or {}
        rows.append(
            [
                variant["name"],
                *(percent(variant["scores"][m]["value"]) for m in metrics[:4]),
                milliseconds(latency["p50_ms"]["value"]) if latency else "–",
                milliseconds(latency["p95_ms"]["value"]) if latency else "–",
                size(memory["over_baseline_bytes"]["value"]) if memory else "–",
                size(variant["file_bytes"]),
            ]
        )
    return _table(rows, right=range(1, len(rows[0])))


def _comparisons(report: Json) -> list[str]:
    rows = [["change of", f"{title(report['metric'])}, points", "p", "would see", "time", "memory", "file"]]
    for step in report["comparisons"]:
        d = step["accuracy"]
        rows.append(
            [
                STEPS[step["name"]],
                f"{points(d['value'])} ({points(d['low'])} to {points(d['high'])})",
                probability(d["p"]),
                points(d["detectable"]).lstrip("+"),
                *(_less(step[key]["value"]) for key in ("time_reduction", "memory_reduction", "size_reduction")),
            ]
        )
    return _table(rows, right=range(1, len(rows[0])))


def hop_rows(hops: Sequence[Json]) -> list[tuple[str, ...]]:
    """Hops as rows of a table, its head first."""
    rows: list[tuple[str, ...]] = [
        ("from one form to the next", "same tokens", "kept", "KL", "same answers", "finding")
    ]
    for hop in hops:
        agreement, divergence = hop["token_agreement"], hop["mean_kl"]
        rows.append((
            f"{hop['parent']} → {hop['name']}", percent(agreement), percent(hop["kept"]),
            "–" if divergence is None else f"{divergence:.4f}", percent(hop["same_answers"]),
            FOUND[hop["broke"]] if hop["broke"] or hop["at_least"] is not None else "not judged",
        ))  # fmt: skip
    return rows


def broken_lines(hops: Sequence[Json]) -> list[str]:
    """What broke the model, hop by hop; nothing if none did."""
    return [line for hop in hops if hop["broke"] for line in _wrapped(f"BROKEN  {hop['says']}", 98)]


def _less(reduction: float | None) -> str:
    return "–" if reduction is None else f"{points(-reduction)} %"


def _gate(gate: Json) -> list[str]:
    head = f"  {gate['verdict']:<10} {title(gate['metric'])}, {bound(gate)}: "
    return [head.rstrip(), *(f"             {line}" for line in _wrapped(gate["says"], 84))]
