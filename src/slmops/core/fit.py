"""The smallest model that does the job: the section `fit` of slmops.yaml, budgets, and the rules by which forms are chosen. Pure.

A candidate is a student in one form. Its file is known once it is converted; how fast it is and what it holds is measured on a few
prompts; how good it is costs most, one answer for each validation example. So candidates are taken in the order of what is
wanted (`prefer`), those beyond a budget are left out before they answer, and a race answers more and more of the examples: a candidate
that cannot come up to the bound any more is given up. What `slmops.flow.fit` runs, this module decides.

Law: `outlook` of all examples is their mean, without doubt; so a candidate that is not given up is judged as exhaustive measurement
would judge it, and one is given up wrongly with a chance of about one in a thousand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from slmops.core.model import Value

SURE = 3.3
"""Standard errors that a bound is away before a candidate is given up: about one chance in a thousand."""
FIRST = 64
"""Fewest examples after which a candidate may be given up."""
PARTS = 8
"""The first part of the race is one in so many examples; each further part doubles what was answered."""


class FitSpec(Value):
    """What `slmops fit` chooses from: every combination of `vary`, in the form that it ships in and in each of `also`."""

    vary: dict[str, tuple[Any, ...]] = Field(
        default_factory=lambda: {
            "convert.precision": ("int4", "int8", "fp32"),
            "convert.embedding_precision": (None, "int8"),
            "compress.quantization": ("none", "gptq"),
        },
        description="keys of this file and the values to try; combinations that do not go together are left out",
    )
    also: tuple[str, ...] | None = Field(
        None,
        description="forms as in convert.also; default: those, and the usual GGUF types where llama.cpp is installed",
    )


@dataclass(frozen=True)
class Budget:
    """What a model may cost on the device; None: as much as it wants. `quality`: share of the reference's score."""

    file_bytes: float | None = None
    ram_bytes: float | None = None
    p95_s: float | None = None
    quality: float | None = 0.98

    def broken(
        self, file_bytes: float | None = None, ram_bytes: float | None = None, p95_s: float | None = None
    ) -> str:
        """The first of these costs that is beyond its budget, as a word; "" if none is. None: not known."""
        for name, value, bound in (
            ("file", file_bytes, self.file_bytes), ("memory", ram_bytes, self.ram_bytes), ("time", p95_s, self.p95_s),
        ):  # fmt: skip
            if value is not None and bound is not None and value > bound:
                return name
        return ""


class Budgeted(Value):
    """One candidate and what became of it."""

    name: str
    values: dict[str, Any] = Field(description="keys of the project file that it differs in")
    form: str = Field(description="its form: onnx, or one of convert.also")
    runtime: str = ""
    state: Literal["chosen", "fits", "file", "memory", "time", "quality", "not needed", "impossible"] = "not needed"
    says: str = ""
    file_bytes: int | None = None
    ram_bytes: float | None = None
    p95_s: float | None = Field(None, description="on the device that was asked for")
    answered: int = Field(0, description="validation examples that it answered")
    score: float | None = Field(None, description="over the examples that it answered")
    low: float | None = Field(None, description="share of the reference's score that it surely has")
    high: float | None = None
    kept: float | None = Field(None, description="its score over the reference's, on the examples that it answered")


@dataclass(frozen=True)
class Outlook:
    """A mean over part of the examples, and where the mean over all of them surely lies."""

    value: float
    low: float
    high: float


def parts(count: int) -> list[int]:
    """How many examples are answered after each part of the race: an eighth, a quarter, half, all."""
    found = []
    size = max(FIRST, math.ceil(count / PARTS))
    while size < count:
        found.append(size)
        size *= 2
    return [*found, count]


def outlook(values: Sequence[float], count: int, least: float, most: float) -> Outlook:
    """Where the mean of all `count` values lies, of which `values` were drawn.

    As Agresti and Coull do for shares, SURE² / 2 values at either end are thought to be seen as well, so that a few equal values do not
    look like certainty; and what is left of a finite number of values narrows the interval.

    Args:
        least, most: the ends between which values lie.
    """
    seen = len(values)
    mean = math.fsum(values) / seen
    if seen >= count:
        return Outlook(mean, mean, mean)
    more = SURE**2 / 2
    total = seen + 2 * more
    centre = (seen * mean + more * (least + most)) / total
    square = math.fsum((v - centre) ** 2 for v in values) + more * ((least - centre) ** 2 + (most - centre) ** 2)
    half = SURE * math.sqrt(square) / total * math.sqrt(1 - seen / count)
    return Outlook(mean, centre - half, centre + half)


def kept(candidate: Sequence[float], reference: Sequence[float], share: float, count: int) -> Outlook:
    """Where the mean of `candidate - share · reference` lies, example by example: from 0 on the candidate keeps its share.

    Args:
        candidate, reference: scores of the same examples, each from 0 to 1, of `count` in all.
    """
    return outlook([c - share * r for c, r in zip(candidate, reference, strict=True)], count, -share, 1.0)


def front(rows: Sequence[Budgeted]) -> list[str]:
    """Names of the candidates with a whole score that no other beats in file, time and score at once (Pareto front)."""
    whole = [row for row in rows if row.state in ("chosen", "fits") or (row.score is not None and row.low == row.high)]

    def costs(row: Budgeted) -> tuple[float, float, float]:
        return (row.file_bytes or 0, row.p95_s or 0.0, -(row.score or 0.0))

    def beaten(row: Budgeted) -> bool:
        mine = costs(row)
        return any(
            all(a <= b for a, b in zip(costs(other), mine, strict=True)) and costs(other) != mine for other in whole
        )

    return [row.name for row in whole if not beaten(row)]


def excess(row: Budgeted, budget: Budget) -> float:
    """By how much a candidate is beyond its budgets, as shares of them; 0 for one that fits. What was not measured does not count."""
    total = 0.0
    for value, bound in (
        (row.file_bytes, budget.file_bytes),
        (row.ram_bytes, budget.ram_bytes),
        (row.p95_s, budget.p95_s),
    ):
        if value is not None and bound is not None:
            total += max(0.0, value / bound - 1)
    if row.kept is not None and budget.quality is not None:
        total += max(0.0, budget.quality - row.kept) / budget.quality
    return total


def nearest(rows: Sequence[Budgeted], budget: Budget) -> Budgeted | None:
    """The candidate that is least beyond the budgets, where none fits; None if none was looked at."""
    seen = [row for row in rows if row.state in ("file", "memory", "time", "quality")]
    return min(seen, key=lambda row: (excess(row, budget), row.file_bytes or 0), default=None)


def combinations(vary: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of values, the first values first."""
    found: list[dict[str, Any]] = [{}]
    for key, values in vary.items():
        found = [before | {key: value} for before in found for value in values]
    return found
