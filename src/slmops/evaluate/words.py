"""How numbers are written for people: percent, points, milliseconds, megabytes. Pure, and the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TITLES = {
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
    "exact_match": "Exact match",
    "field_f1": "Field F1",
    "rouge_l": "ROUGE-L",
    "token_f1": "Token F1",
    "valid": "Valid answers",
    "in_scope_accuracy": "Accuracy in scope",
    "out_of_scope_recall": "Out-of-scope recall",
    "inference_time_reduction": "Inference time",
    "memory_reduction": "Memory",
    "accuracy_retained": "Accuracy retained",
    "size_reduction_vs_fp32": "Size against fp32",
    "size_reduction_vs_fp16": "Size against fp16",
    "p95_ms": "95 % of responses within",
    "file_mb": "Model file",
    "quantization_loss": "Lost by quantisation",
}
"""Metric names as titles."""

NOUNS = {"examples": "test examples", "prompts": "timed prompts (evaluate.measure.prompts)", "rounds": "rounds"}
"""What a gate needs more of."""

REDUCTIONS = frozenset(
    {"inference_time_reduction", "memory_reduction", "size_reduction_vs_fp32", "size_reduction_vs_fp16"}
)


def title(metric: str) -> str:
    """A metric's name for people."""
    return TITLES.get(metric, metric)


def inside(metric: str) -> str:
    """A metric's name inside a sentence."""
    text = title(metric)
    return text if text[:2].isupper() else text[0].lower() + text[1:]


def percent(share: float | None, digits: int = 1) -> str:
    """`93.4 %`; a dash for what was not measured."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def points(share: float | None) -> str:
    """A difference of shares in percentage points, with its sign: `+0.4`, `−1.2`."""
    if share is None:
        return "–"
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def milliseconds(value: float | None) -> str:
    """`3.2 ms`, or seconds from ten of them on."""
    if value is None:
        return "–"
    if value >= 10_000:
        return f"{value / 1000:.1f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


def size(count: float | None) -> str:
    """Bytes in decimal units: `1.3 MB`."""
    if count is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:.1f} {unit}" if abs(count) < 100 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"


def probability(p: float) -> str:
    """A p value: `0.03`, `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def shown(metric: str, value: float | None) -> str:
    """A gate's or metric's value in its own unit."""
    if value is None:
        return "–"
    if metric == "p95_ms":
        return milliseconds(value)
    if metric == "file_mb":
        return f"{value:.2f} MB"
    if metric == "quantization_loss":
        return f"{points(value)} points"
    if metric in REDUCTIONS:
        return f"{points(-value)} %"
    return percent(value)


def bound(gate: Mapping[str, Any]) -> str:
    """A gate's bound as words: `at least 92.0 %`; a reduction of 0.9 is `at least 90.0 % less`."""
    word, value = ("at least", gate["at_least"]) if gate["at_least"] is not None else ("at most", gate["at_most"])
    if gate["metric"] in REDUCTIONS:
        return f"{word} {percent(value)} less"
    if gate["metric"] == "quantization_loss":
        return f"{word} {points(value).lstrip('+')} points"
    return f"{word} {shown(gate['metric'], value)}"


def interval(metric: str, value: Mapping[str, Any]) -> str:
    """`90.1 to 92.3 %`; empty where there is no interval; `exact` where it has no width."""
    low, high = value["low"], value["high"]
    if low is None or high is None:
        return ""
    if low == high:
        return "exact"
    if metric in REDUCTIONS:
        low, high = high, low
    ends = shown(metric, low), shown(metric, high)
    units = {end.partition(" ")[2] for end in ends}
    if len(units) == 1:
        return f"{ends[0].partition(' ')[0]} to {ends[1]}"
    return f"{ends[0]} to {ends[1]}"


def count(number: int | None, noun: str = "") -> str:
    """`1,500 labels`, `1 label`."""
    if number is None:
        return f"its {noun}s" if noun else "–"
    if not noun:
        return f"{number:,}"
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
