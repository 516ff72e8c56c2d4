"""What `slmops fit` found, in words: why one was chosen, what is nearest, the table. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slmops.core.fit import Budget, Budgeted
from slmops.core.words import Prefer
from slmops.evaluate.words import milliseconds, percent, size

STATES = {
    "chosen": "chosen", "fits": "fits", "file": "file too large", "memory": "too much memory", "time": "too slow",
    "quality": "not good enough", "not needed": "not needed", "impossible": "does not go together",
}  # fmt: skip
WANTED = {"smallest": "smallest file", "fastest": "shortest time", "best": "best score"}


def chosen_because(chosen: Budgeted, prefer: Prefer, rows: Sequence[Budgeted], budget: Budget) -> str:
    """One or two sentences."""
    failed = [row for row in rows if row.state == "quality"]
    text = f"{chosen.name} has the {WANTED[prefer]} of those that fit: {size(chosen.file_bytes)}"
    if chosen.p95_s is not None:
        text += f", 95 % of answers within {milliseconds(1000 * chosen.p95_s)}, {size(chosen.ram_bytes)} of memory"
    if chosen.kept is not None:
        text += f", {percent(chosen.kept)} of the reference's score"
        if budget.quality is not None:
            text += f" ({100 * budget.quality:g} % asked)"
    if prefer == "smallest" and failed:
        smaller = [row.name for row in failed if (row.file_bytes or 0) < (chosen.file_bytes or 0)]
        if smaller:
            text += f". Smaller but not good enough: {', '.join(smaller)}"
    return text


def nothing_fits(close: Budgeted | None, budget: Budget) -> str:
    """That nothing fits, and what is nearest."""
    if close is None:
        return "nothing fits"
    misses = []
    for what, value, bound, show in (
        ("file", close.file_bytes, budget.file_bytes, size), ("memory", close.ram_bytes, budget.ram_bytes, size),
        ("time", None if close.p95_s is None else 1000 * close.p95_s, None if budget.p95_s is None else 1000 * budget.p95_s, milliseconds),
    ):  # fmt: skip
        if value is not None and bound is not None and value > bound:
            misses.append(f"{what} {show(value)} where {show(bound)} may be")
    if close.kept is not None and budget.quality is not None and close.kept < budget.quality:
        misses.append(f"{percent(close.kept)} of the reference's score where {percent(budget.quality)} is asked")
    return f"nothing fits; nearest is {close.name}: {', '.join(misses) or close.says}"


def fit_rows(rows: Sequence[Mapping[str, Any]], front: Sequence[str]) -> list[list[str]]:
    """The table, its head first; `*` marks candidates that no other beats in file, time and score at once."""
    found = [["", "", "file", "memory", "95 % within", "score", "of the reference", "examples", "finding"]]
    for row in rows:
        p95 = row["p95_s"]
        between = (
            ""
            if row["low"] is None or row["low"] == row["high"]
            else f" ({percent(row['low'])} to {percent(row['high'])})"
        )
        found.append([
            ">" if row["state"] == "chosen" else "*" if row["name"] in front else "", row["name"], size(row["file_bytes"]),
            size(row["ram_bytes"]), "–" if p95 is None else milliseconds(1000 * p95), percent(row["score"]),
            percent(row["kept"]) + between, f"{row['answered']:,}" if row["answered"] else "–", finding(row),
        ])  # fmt: skip
    return found


def finding(row: Mapping[str, Any]) -> str:
    """What became of a candidate, in a few words."""
    said = STATES[row["state"]]
    return f"{said}: {row['says']}" if row["says"] and row["state"] in ("not needed", "impossible") else said
