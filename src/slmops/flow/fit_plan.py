"""What `slmops fit` may choose from: candidates, each with the steps that make, time and question it. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from slmops.core.digest import canonical_json
from slmops.core.fit import Budgeted, combinations
from slmops.core.spec import Spec
from slmops.core.step import Step
from slmops.errors import Problem, SpecError, UsageError
from slmops.flow.checks import check
from slmops.flow.planner import plan
from slmops.flow.project import spec_problems
from slmops.flow.search_space import APART, shown, touches, with_values
from slmops.train.shape import parameters

ONNX = "onnx"
TIMING = "fit-time"
LEAST_BITS = {"gguf-q2_k": 2.5, "gguf-q3_k_m": 3.4}
"""Fewest bits a weight in forms of fewer than 4."""


@dataclass(frozen=True)
class Candidate:
    """A student in one form.

    Attributes:
        number: its place among all.
        values: of keys in which its project differs.
        form: `onnx`, or one of convert.also.
        steps: the plan of its project; `asked`: the one of them that answers the test data.
        least_bytes: its file is surely no smaller; 0 where nothing is known before its student is made.
    """

    number: int
    name: str
    values: Mapping[str, Any]
    form: str
    steps: tuple[Step, ...]
    asked: Step
    least_bytes: float = 0.0

    @property
    def model(self) -> str:
        """The step that makes its model."""
        return self.asked.inputs["model"]

    @property
    def runtime(self) -> str:
        """What runs it."""
        return str(self.asked.params["runtime"])


@dataclass(frozen=True)
class Space:
    """Candidates, and the combinations that make no project, with the reason."""

    candidates: tuple[Candidate, ...]
    impossible: tuple[Budgeted, ...] = field(default=())


def space(spec: Spec, also: Sequence[str]) -> Space:
    """All candidates of a spec, each once: what the same steps make is one.

    Args:
        also: forms beside the one that ships.

    Raises:
        UsageError: no combination makes a project.
    """
    found: list[Candidate] = []
    impossible: list[Budgeted] = []
    seen: set[str] = set()
    for values in combinations(spec.fit.vary):
        for form in (ONNX, *also):
            name = _name(spec, values, form)
            try:
                own: dict[str, Any] = {"convert.also": [] if form == ONNX else [form]}
                own |= {"evaluate.kv_cache": None} if form == ONNX else {}
                changed = with_values(spec, dict(values) | own)
                problems = check(changed)
            except (ValidationError, SpecError) as error:
                problems = list(error.problems) if isinstance(error, SpecError) else spec_problems(error)
            if problems:
                if form == ONNX:
                    impossible.append(
                        Budgeted(name=name, values=dict(values), form=form, state="impossible", says=str(problems[0]))
                    )
                continue
            steps = plan(changed)
            variant = f"student-{changed.convert.precision if form == ONNX else form}"
            asked = next(step for step in steps if step.id == f"predict-{variant}")
            content = _content(steps, asked)
            if content in seen:
                continue
            seen.add(content)
            found.append(Candidate(len(found), name, dict(values), form, steps, asked, _least_bytes(changed, form)))
    if not found:
        raise UsageError(
            "no combination of fit.vary makes a project" + (f": {impossible[0].says}" if impossible else ""),
            "change fit.vary",
        )
    return Space(tuple(found), tuple(impossible))


def problems(spec: Spec) -> list[Problem]:
    """What is wrong with a spec's section `fit`."""
    found = []
    for key, values in spec.fit.vary.items():
        apart = next((name for name in APART if touches(name, key)), None)
        at = f"fit.vary.{key}"
        if apart is not None:
            found.append(Problem(f"cannot be varied: {APART[apart]}", "take it out of fit.vary", path=at))
        elif key == "convert.also":
            found.append(Problem("cannot be varied", "name forms in fit.also", path=at))
        elif not values:
            found.append(Problem("has no values", "give at least one", path=at))
        for value in values if apart is None else ():
            try:
                with_values(spec, {key: value})
            except ValidationError as error:
                first = spec_problems(error)[0]
                found.append(Problem(f"{shown(value)}: {first.message}", first.hint, path=at))
    return found


def _name(spec: Spec, values: Mapping[str, Any], form: str) -> str:
    """The form, and the values in which it differs from the file's own."""
    convert = form != ONNX
    said = []
    for key, value in values.items():
        if (convert and key.startswith("convert.")) or key == "convert.precision" or value == value_at(spec, key):
            continue
        said.append(f"{key.rpartition('.')[2]}={shown(value)}")
    precision = values.get("convert.precision", spec.convert.precision)
    return " ".join([form if convert else f"{ONNX}-{precision}", *said])


def value_at(spec: Spec, key: str) -> Any:
    """What the file says at a dotted key; None where there is nothing."""
    node: Any = spec
    for part in key.split("."):
        node = getattr(node, part, None)
    return node


def _least_bytes(spec: Spec, form: str) -> float:
    """Of the file that ships, by the student's parameters; 0 where they are not known beforehand."""
    tokenizer = spec.student.tokenizer
    if spec.student.model is None or spec.compress.prune is not None or spec.compress.vocabulary != "whole":
        return 0.0  # what is taken out of it is known when it is made
    if tokenizer == "teacher":
        if spec.teacher is None or spec.teacher.model is None:
            return 0.0
        tokenizer = spec.teacher.tokenizer
    bits = 2.0 if spec.convert.file_mb is not None else LEAST_BITS.get(form, 4.0)
    if spec.train.quantization_aware == "ternary":
        bits = math.log2(3)
    return parameters(spec.student.model, tokenizer.vocabulary) * bits / 8


def _content(steps: Sequence[Step], asked: Step) -> str:
    """What makes a candidate's model, whatever its steps are called."""
    known = {step.id: step for step in steps}

    def of(id: str) -> Any:
        step = known[id]
        inputs = {name: of(other) for name, other in step.inputs.items()}
        return [step.method, step.params, inputs, dict(step.sources), step.seed]

    return canonical_json([asked.method, of(asked.inputs["model"])])


def timing(candidate: Candidate, spec: Spec, threads: int) -> Step:
    """The step that times a candidate on validation prompts, in fresh processes."""
    measure = spec.evaluate.measure.model_dump(mode="json") | {
        "variants": {"student": candidate.runtime}, "max_new_tokens": spec.evaluate.max_new_tokens, "split": "validation",
        "threads": threads,
    }  # fmt: skip
    inputs = {"model.student": candidate.model, "data": "data"}
    return Step(TIMING, "evaluate.measure", measure, inputs, about=f"time and memory of {candidate.name}")


def answers(candidate: Candidate, start: int, end: int) -> Step:
    """The step that answers the validation examples from `start` to `end`, by their ids."""
    asked = candidate.asked
    params = dict(asked.params) | {"split": "validation", "max_examples": end, "skip": start}
    about = f"{candidate.name} on {end - start} validation examples"
    return Step(
        f"fit-answers-{end}",
        asked.method,
        params,
        dict(asked.inputs),
        dict(asked.sources),
        asked.seed,
        asked.threads,
        about,
    )
