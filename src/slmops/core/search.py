"""What a search is: the section `search` of slmops.yaml, trials, and the rules by which they are compared. Pure.

What a trial runs is `slmops.flow.search`; who picks its parameters is `slmops.flow.search_study`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from slmops.core.model import Value

Positive = Annotated[int, Field(ge=1)]

SearchMetric = Literal[
    "accuracy", "macro_f1", "exact_match", "field_f1", "rouge_l", "token_f1", "valid", "in_scope_accuracy", "out_of_scope_recall",
    "validation_loss", "file_mb", "parameters",
]  # fmt: skip
Direction = Literal["maximize", "minimize"]


class Range(Value):
    """What a search may try for one key: `choices`, or everything from `low` to `high`, both included."""

    choices: tuple[Any, ...] | None = Field(None, description="values as the key itself takes them, or whole sections")
    low: float | None = None
    high: float | None = None
    log: bool = Field(False, description="as likely between 0.001 and 0.01 as between 0.01 and 0.1")
    step: Annotated[float, Field(gt=0)] | None = Field(None, description="only low, low + step, low + 2 step, …")

    @model_validator(mode="after")
    def _one(self) -> Range:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.step is not None or self.log:
                raise ValueError("give choices, or low and high, not both")
            if not self.choices:
                raise ValueError("choices is empty")
            if any(choice in self.choices[:i] for i, choice in enumerate(self.choices)):
                raise ValueError("the same choice twice")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give choices, or low and high")
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be less than high ({self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError("low must be above 0 where log is true")
        if self.log and self.step is not None:
            raise ValueError("give log or step, not both")
        return self


class Objective(Value):
    """What trials are compared by.

    Scores are those of the shipped precision on validation data. validation_loss: nats per answer of the trained student,
    in torch; file_mb: the converted model file; parameters: of the student.
    """

    metric: SearchMetric
    direction: Direction | None = Field(None, description="default: maximize scores, minimize the rest")

    @property
    def way(self) -> Direction:
        """`direction`, or its default."""
        if self.direction is not None:
            return self.direction
        return "minimize" if self.metric in ("validation_loss", "file_mb", "parameters") else "maximize"


class Search(Value):
    """What `slmops search` tries. Trials are judged on validation data, never on test data."""

    trials: Positive = 20
    parameters: dict[str, Range] = Field(description="dotted key of this file to what to try, as train.learning_rate")
    objectives: tuple[Objective, ...] = Field((), description="default: the first metric of evaluate")
    sampler: Literal["tpe", "random"] = Field("tpe", description="tpe: learns from earlier trials (arXiv 2304.11127)")
    pruning: Literal["median", "off"] = Field(
        "median",
        description="median: end a training whose held-out loss is worse than the median of earlier trials at the same point",
    )
    parallel: Positive = Field(
        1, description="trials beside each other; the next ones are chosen when all of them ended"
    )
    storage: str | None = Field(
        None, description="default: a file in .slmops/search; or a URL such as postgresql://USER@HOST/DATABASE"
    )

    @model_validator(mode="after")
    def _sound(self) -> Search:
        if not self.parameters:
            raise ValueError("parameters is empty: name at least one key to try values for")
        metrics = [objective.metric for objective in self.objectives]
        if len(set(metrics)) < len(metrics):
            raise ValueError("the same metric twice in objectives")
        return self


TrialState = Literal["running", "complete", "pruned", "failed"]

FIRST_WHOLE = 5
"""So many trials end before one is given up: a median of fewer says little."""

FIRST_LOOK = 3
"""A training is not given up before its loss was looked at so many times: all begin badly."""


@dataclass(frozen=True)
class Trial:
    """One set of parameters and what came of it.

    Attributes:
        number: counts from 0 in the order in which trials were chosen.
        batch: number of the first trial of those that were chosen together.
        parameters: dotted key to value.
        values: one number an objective, in their order; None unless complete.
        curve: the training's validation losses, in their order.
        why: for a failed trial what went wrong.
    """

    number: int
    batch: int
    parameters: Mapping[str, Any]
    state: TrialState = "running"
    values: tuple[float, ...] | None = None
    curve: tuple[float, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended; the fields are those of `Trial`."""

    state: Literal["complete", "pruned", "failed"]
    values: tuple[float, ...] | None = None
    curve: tuple[float, ...] = field(default=())
    why: str = ""


def hopeless(curve: Sequence[float], earlier: Sequence[Sequence[float]]) -> bool:
    """Whether a training is to be given up: its best loss so far is above the median of earlier ones at the same look.

    This is the rule of Optuna's MedianPruner for losses that are reported one after another.

    Args:
        curve: validation losses so far.
        earlier: those of the complete trials.
    """
    looks = len(curve)
    if looks < FIRST_LOOK or len(earlier) < FIRST_WHOLE:
        return False
    same = [other[looks - 1] for other in earlier if len(other) >= looks]
    return bool(same) and min(curve) > statistics.median(same)


def dominates(left: Sequence[float], right: Sequence[float], ways: Sequence[Direction]) -> bool:
    """Whether the left values are at least as good as the right in every objective and better in one."""
    signed = [(a, b) if way == "minimize" else (-a, -b) for a, b, way in zip(left, right, ways, strict=True)]
    return all(a <= b for a, b in signed) and any(a < b for a, b in signed)


def front(trials: Sequence[Trial], ways: Sequence[Direction]) -> tuple[Trial, ...]:
    """The complete trials that no other dominates, in the order of their numbers.

    With one objective that is the best trial; of several with the same values the first one stands for all.
    """
    done = sorted((t for t in trials if t.state == "complete"), key=lambda t: t.number)
    first: dict[tuple[float, ...], Trial] = {}
    for trial in done:
        first.setdefault(trial.values or (), trial)
    kept = first.values()
    return tuple(t for t in kept if not any(dominates(o.values or (), t.values or (), ways) for o in kept))
