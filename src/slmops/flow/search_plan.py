"""What a trial runs and how it is judged: the plan of its spec, up to the steps that the objectives look at. Pure.

Scores come from predictions on validation data with the precision that ships; no step of a trial reads the answers of
test data. The steps of several trials make one plan: what they have in common, and what the project itself plans, is in
it once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slmops.core.digest import canonical_json, digest_json
from slmops.core.search import Objective, SearchMetric
from slmops.core.spec import Metric, Spec
from slmops.core.step import Step, key_parts
from slmops.errors import DataError
from slmops.flow import methods
from slmops.flow.planner import finished, plan
from slmops.flow.pruning import last
from slmops.flow.runner import selected
from slmops.flow.search_space import Dimension, with_values
from slmops.flow.state import State
from slmops.store.files import read_json

LOCAL: tuple[SearchMetric, ...] = ("validation_loss", "file_mb", "parameters")
"""Objectives that are no scores."""

STUDENT, ANSWERS, LOSS = "student", "validate", "validate-loss"


def objectives_of(spec: Spec) -> tuple[Objective, ...]:
    """The objectives of a search; default: the metric that the report compares models by."""
    from slmops.evaluate.metrics import DEFAULTS

    assert spec.search is not None
    if spec.search.objectives:
        return spec.search.objectives
    return (Objective(metric=(spec.evaluate.metrics or DEFAULTS[spec.task.type])[0]),)


def scored(spec: Spec, metric: SearchMetric) -> Metric:
    """A score metric, checked against the task.

    Raises:
        UsageError: it does not fit the task.
    """
    from slmops.evaluate.metrics import metrics_for

    return metrics_for(spec.task, [metric])[0]  # type: ignore[list-item]


def trial_steps(spec: Spec) -> list[Step]:
    """The steps of one trial, each after its inputs.

    Raises:
        SpecError: stages that do not fit each other.
    """
    metrics = [objective.metric for objective in objectives_of(spec)]
    converted = f"{STUDENT}-{spec.convert.precision}"
    steps, wanted = list(plan(spec)), [STUDENT]
    if "parameters" in metrics:
        wanted.append(finished(spec))
    if any(metric not in LOCAL for metric in metrics):
        params = {
            "max_new_tokens": spec.evaluate.max_new_tokens, "max_examples": spec.evaluate.max_examples,
            "runtime": "onnx_genai", "split": "validation",
        }  # fmt: skip
        inputs = {"model": converted, "data": "data"}
        about = f"{converted} on the validation data"
        steps.append(Step(ANSWERS, "evaluate.predict", params, inputs, threads=1, about=about))
        wanted.append(ANSWERS)
    if "validation_loss" in metrics:
        inputs = {"model": last(spec), "data": "data"}
        about = "loss of the student on the validation data"
        steps.append(Step(LOSS, "train.validation_loss", {}, inputs, threads=1, about=about))
        wanted.append(LOSS)
    if "file_mb" in metrics:
        wanted.append(converted)
    return selected(steps, wanted)


@dataclass(frozen=True)
class Merged:
    """Several trials as one plan.

    Attributes:
        steps: all steps; those that only some trials have are named `ID@NUMBER` after the first of them.
        names: trial number to its own step ids to the ids in `steps`.
    """

    steps: tuple[Step, ...]
    names: Mapping[int, Mapping[str, str]]

    def trials_of(self, id: str) -> list[int]:
        """The trials that a step of the plan belongs to."""
        return [number for number, names in self.names.items() if id in names.values()]


def merge(base: Sequence[Step], trials: Mapping[int, Sequence[Step]]) -> Merged:
    """One plan of the trials' steps. A step that does the same as one before it, of `base` or of a trial, is that one.

    Args:
        base: the project's own plan; its steps lend their names and are in the result only where a trial has them.
    """
    known: dict[str, str] = {}
    for step in base:
        known.setdefault(_content(step), step.id)
    steps: dict[str, Step] = {}
    names: dict[int, dict[str, str]] = {}
    for number, own in sorted(trials.items()):
        names[number] = {}
        for step in own:
            here = replace(step, inputs={name: names[number][id] for name, id in step.inputs.items()})
            id = known.setdefault(_content(here), f"{step.id}@{number}")
            names[number][step.id] = id
            steps.setdefault(id, replace(here, id=id))
    return Merged(tuple(steps.values()), names)


def _content(step: Step) -> str:
    return canonical_json(
        [step.method, step.params, dict(step.inputs), dict(step.sources), step.seed, step.threads]
    )  # fmt: skip


def identity(spec: Spec, space: Sequence[Dimension], state: State) -> str:
    """64 hex digits of everything, beside its parameters, that can change what comes of a trial or which trials follow.

    Trials of one identity are one search, whenever they ran: on another seed, data file, method version or package
    version another search begins. How many trials there are, and how many run beside each other, does not count.
    """
    assert spec.search is not None
    first = with_values(spec, {dimension.key: dimension.ends[0] for dimension in space})
    steps = []
    for step in trial_steps(first):
        declaration = methods.get(step.method).DECLARATION
        digests = dict(step.inputs) | state.source_digests(step)
        environment = methods.environment(declaration, state.threads(step), step.params)
        steps.append([step.id, key_parts(step, declaration, digests, environment)])
    search = spec.search.model_dump(mode="json", include={"parameters", "sampler", "pruning"})
    wanted = [[objective.metric, objective.way] for objective in objectives_of(spec)]
    return digest_json([steps, search, wanted, spec.seed]).removeprefix("sha256:")


def check_validation(data: Path) -> None:
    """Refuse to choose by data that is not there.

    Raises:
        DataError: the dataset has no validation examples.
    """
    from slmops.flow.search_space import NO_VALIDATION

    file = data / "validation.jsonl"
    if not file.is_file() or not file.stat().st_size:
        raise DataError(f"the validation split {NO_VALIDATION}", "give data.splits.validation, for instance 0.1")


def values_of(spec: Spec, outputs: Mapping[str, Path]) -> tuple[float, ...]:
    """What the objectives come to.

    Args:
        outputs: step id of `trial_steps` to the folder that it made.

    Raises:
        DataError: a metric looks at no validation example at all.
    """
    return tuple(_value(spec, objective.metric, outputs) for objective in objectives_of(spec))


def _value(spec: Spec, metric: SearchMetric, outputs: Mapping[str, Path]) -> float:
    from slmops.evaluate import metrics as m
    from slmops.evaluate.inputs import model_bytes, read_predictions

    if metric == "validation_loss":
        return float(_json(outputs[LOSS] / "loss.json")["nats_per_answer"])
    if metric == "parameters":
        return float(_json(outputs[finished(spec)] / "training.json")["parameters"])
    if metric == "file_mb":
        return model_bytes(outputs[f"{STUDENT}-{spec.convert.precision}"]) / 1e6
    rows = read_predictions(outputs[ANSWERS])
    golds, answers = [row.gold for row in rows], [row.answer for row in rows]
    name = scored(spec, metric)
    if name == "macro_f1":
        value = m.macro_f1(golds, answers)
    else:
        labels = spec.task.labels or _json(outputs["data"] / "info.json").get("labels") or ()
        value = m.columns(name, golds, answers, spec.task, labels).value
    if value is None:
        raise DataError(
            f"{metric} looks at no validation example", "choose another objective, or give more validation data"
        )
    return value


def curve_of(student: Path) -> tuple[float, ...]:
    """The validation losses of a finished training, in their order."""
    points = _json(student / "training.json")["points"]
    return tuple(p["validation_loss"] for p in points if p["validation_loss"] is not None)


def _json(path: Path) -> Any:
    return read_json(path) or {}
