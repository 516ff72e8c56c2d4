"""What a search may try, held against the typed spec: every key, every value, and how values meet.

Laws: where `problems` finds nothing, each single value and each pair of ends that it looked at makes a whole spec whose
stages fit each other; `with_values(spec, {k: v})` is what `--set k=v` makes of the file, and `override(k, v)` is that text.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from slmops.core.search import Range
from slmops.core.spec import Spec
from slmops.errors import Problem
from slmops.flow.project import annotations_at, spec_problems

MOST = 128
"""So many combinations of values are all looked at; of more only those in which one parameter leaves its first or last."""

APART = {
    "name": "it is no part of a trial",
    "version": "it is no part of a trial",
    "licence": "it is no part of a trial",
    "search": "a search does not search itself",
    "adapters": "trials are judged by the student alone",
    "task": "trials would be asked different things",
    "evaluate": "trials would be judged in different ways",
    "data.path": "trials would be judged on different data",
    "data.format": "trials would be judged on different data",
    "data.columns": "trials would be judged on different data",
    "data.splits": "trials would be judged on different data",
    "data.overlap": "trials would be judged on different data",
}
"""Keys that must be the same for all trials, with the reason."""

MOVES_LOSS = ("data", "synthesize", "teacher", "student.tokenizer", "student.base", "seed", "train.holdout",
              "train.max_length", "train.evaluations", "train.quantization_aware", "train.method", "train.preference")  # fmt: skip
"""Keys that change what a training's own validation loss is counted on, or when: such losses do not compare."""


@dataclass(frozen=True)
class Dimension:
    """One parameter: its dotted key, and what its values are."""

    key: str
    kind: Literal["choice", "whole", "number"]
    range: Range

    @property
    def ends(self) -> list[Any]:
        """All choices, or the two ends."""
        if self.range.choices is not None:
            return list(self.range.choices)
        ends = [self.range.low, self.range.high]
        return [int(end) for end in ends if end is not None] if self.kind == "whole" else ends


def dimensions(spec: Spec) -> tuple[Dimension, ...]:
    """The parameters of a spec whose search section has no problems, sorted by key."""
    assert spec.search is not None
    found = []
    for key, given in sorted(spec.search.parameters.items()):
        kind = _kind(key)
        assert kind is not None
        found.append(Dimension(key, "choice" if given.choices is not None else kind, given))
    return tuple(found)


def _kind(key: str) -> Literal["choice", "whole", "number"] | None:
    """What a key of the project file takes; None where there is no such key."""
    annotations = annotations_at(tuple(key.split(".")))
    if annotations is None:
        return None
    leaves = list(_leaves(annotations))
    return "number" if float in leaves else "whole" if int in leaves else "choice"


def _leaves(annotation: Any) -> Iterator[Any]:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        yield from _leaves(arguments[0])
    elif arguments and typing.get_origin(annotation) is not typing.Literal:
        for argument in arguments:
            yield from _leaves(argument)
    else:
        yield annotation


def with_values(spec: Spec, values: Mapping[str, Any]) -> Spec:
    """The spec with other values at some dotted keys.

    Raises:
        ValidationError: they make no spec.
    """
    tree = spec.model_dump(mode="json", exclude_unset=True)
    for key, value in sorted(values.items(), key=lambda item: item[0].count(".")):  # whole sections come first
        *above, last = key.split(".")
        node = tree
        for part in above:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[last] = value
    return Spec.model_validate_json(json.dumps(tree))


PLAIN = re.compile(r"[A-Za-z_][\w./-]*")


def shown(value: Any) -> str:
    """A value as YAML reads it: words bare, the rest as JSON."""
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in ("true", "false", "null"):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"{value:.1f}"
    return json.dumps(value, ensure_ascii=False)


def override(key: str, value: Any) -> str:
    """What `--set` takes to give a key a value."""
    return f"{key}={shown(value)}"


def problems(spec: Spec) -> list[Problem]:
    """Everything that is wrong with a spec's search section, each with its place in the file."""
    if spec.search is None:
        return []
    found = [problem for key, given in spec.search.parameters.items() for problem in _wrong(key, given, spec)]
    return found or [*_combined(spec), *_objectives(spec)]


def _at(key: str) -> str:
    return f"search.parameters.{key}"


def _wrong(key: str, given: Range, spec: Spec) -> Iterator[Problem]:
    """What is wrong with one parameter by itself."""
    apart = next((name for name in APART if touches(name, key)), None)
    other = next((name for name in spec.search.parameters if name.startswith(f"{key}.")), None) if spec.search else None
    kind = _kind(key)
    if kind is None:
        keys = list(_keys(Spec))
        by_last = [name for name in keys if name.rpartition(".")[2] == key.rpartition(".")[2]]
        close = by_last[:1] if len(by_last) == 1 else difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else "every key is explained in docs/reference/spec.md"
        yield Problem("the project file has no such key", hint, path=_at(key))
    elif apart is not None:
        yield Problem(f"cannot be searched: {APART[apart]}", "take it out of search.parameters", path=_at(key))
    elif other is not None:
        yield Problem(f"holds {other}, which is searched too", "take one of the two out", path=_at(key))
    elif given.choices is None and kind == "choice":
        yield Problem("takes no number", "give choices", path=_at(key))
    elif given.choices is None and kind == "whole":
        parts = {"low": given.low, "high": given.high, "step": given.step}
        odd = [f"{name} {value:g}" for name, value in parts.items() if value is not None and not value.is_integer()]
        if odd:
            yield Problem(f"takes whole numbers, not {', '.join(odd)}", "round them", path=_at(key))


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        for leaf in () if typing.get_origin(info.annotation) is dict else _leaves(info.annotation):
            if isinstance(leaf, type) and issubclass(leaf, BaseModel) and name != "search":
                yield from _keys(leaf, f"{prefix}{name}.")


def _combined(spec: Spec) -> list[Problem]:
    """Values that make no project: those that never do by themselves, or else the first combinations that do not."""
    from slmops.flow.checks import check

    if check(spec):
        return []  # the plan itself says so
    space = dimensions(spec)
    combinations = _combinations([dimension.ends for dimension in space])
    failures = []
    for combination in combinations:
        values = dict(zip((d.key for d in space), combination, strict=True))
        failures.append(_failure(spec, values))
    found = []
    for i, dimension in enumerate(space):
        for value in dimension.ends:
            own = [f for f, c in zip(failures, combinations, strict=True) if c[i] is value or c[i] == value]
            first = own[0] if own else None
            if first is not None and all(own):
                near = [f for f in own if f is not None and touches(f.path, dimension.key)]
                if near or len(space) == 1:
                    problem = near[0] if near else first
                    text = f"{shown(value)}: {_named(problem, dimension.key)}"
                    found.append(Problem(text, problem.hint, path=_at(dimension.key)))
    if found:
        return found
    for failure, combination in zip(failures, combinations, strict=True):
        if failure is not None:
            pairs = ", ".join(f"{d.key}: {shown(v)}" for d, v in zip(space, combination, strict=True))
            hint = failure.hint or "leave one of these values out, or search a whole section by its choices"
            return [Problem(f"{pairs}: {failure.path}: {failure.message}", hint, path="search.parameters")]
    return []


def touches(path: str, key: str) -> bool:
    """Whether one of two dotted keys is the other or holds it."""
    return f"{path}.".startswith(f"{key}.") or f"{key}.".startswith(f"{path}.")


def _named(problem: Problem, key: str) -> str:
    return problem.message if problem.path == key else f"{problem.path}: {problem.message}"


def _combinations(ends: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    count = 1
    for own in ends:
        count *= len(own)
    if count <= MOST:
        return list(itertools.product(*ends))
    first, last = tuple(own[0] for own in ends), tuple(own[-1] for own in ends)
    return [(*base[:i], value, *base[i + 1 :]) for base in (first, last) for i, own in enumerate(ends) for value in own]


def _failure(spec: Spec, values: Mapping[str, Any]) -> Problem | None:
    """The first problem of the spec with these values."""
    from slmops.flow.checks import check

    try:
        other = with_values(spec, values)
    except ValidationError as error:
        return spec_problems(error)[0]
    return next(iter(check(other)), None)


def _objectives(spec: Spec) -> list[Problem]:
    """Objectives that do not fit the task, and validation data that the file says is not there."""
    from slmops.errors import UsageError
    from slmops.flow.search_plan import LOCAL, objectives_of, scored

    found = []
    for objective in objectives_of(spec):
        if objective.metric not in LOCAL:
            try:
                scored(spec, objective.metric)
            except UsageError as error:
                found.append(Problem(error.message, error.hint, path="search.objectives"))
    judged = any(o.metric not in ("file_mb", "parameters") for o in objectives_of(spec))
    if judged and spec.data.splits.validation in (0.0, ()):
        found.append(
            Problem(NO_VALIDATION, "give validation data, for instance a share of 0.1", path="data.splits.validation")
        )
    return found


NO_VALIDATION = (
    "is empty, and trials are judged on validation data; the share of its own examples that a training holds out is too "
    "small to choose by, and test data is never looked at"
)
