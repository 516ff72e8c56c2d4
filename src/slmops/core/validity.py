"""What an answer to a task has to look like, as far as the training answers tell.

Classification: one of the known labels. Extraction: one JSON object whose keys, nested keys, types and function names
occur in the training answers. Other tasks: some text. Pure.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmops.core.digest import canonical_json
from slmops.core.spec import Task

FUNCTION_KEYS = ("function", "name", "tool", "intent", "action")
"""Top-level keys of an extraction answer whose values are a closed set: only those seen in training are valid."""

_FENCE = re.compile(r"^```[\w-]*\s*\n(.*?)\n?```\s*$", re.S)
_THINKING = re.compile(r"^\s*<think(?:ing)?>.*?</think(?:ing)?>", re.S)
_LEAD = re.compile(r"^(?:the\s+)?(?:label|intent|category|class|answer)\s*(?:is\s*:?|:)\s*", re.I)


@dataclass(frozen=True)
class Shape:
    """What JSON answers look like: types by key path, keys that every answer has, values of function keys."""

    types: dict[tuple[str, ...], frozenset[str]]
    required: frozenset[str]
    functions: dict[str, frozenset[str]]
    compact: bool

    @classmethod
    def of(cls, answers: Iterable[str]) -> Shape | None:
        """The shape of training answers; None if none of them is a JSON object."""
        types: dict[tuple[str, ...], set[str]] = {}
        functions: dict[str, set[str]] = {}
        styles: Counter[bool] = Counter()
        required: set[str] | None = None
        for text in answers:
            value = parse_object(text)
            if not isinstance(value, dict):
                continue
            required = set(value) if required is None else required & set(value)
            styles[text == dump(value, compact=True)] += 1
            for path, leaf in _paths(value):
                types.setdefault(path, set()).add(_type(leaf))
            for key in FUNCTION_KEYS:
                if isinstance(value.get(key), str):
                    functions.setdefault(key, set()).add(value[key])
        if required is None:
            return None
        frozen = {path: frozenset(kinds) for path, kinds in types.items()}
        closed = {key: frozenset(names) for key, names in functions.items() if key in required}
        return cls(frozen, frozenset(required), closed, styles[True] > styles[False])

    def problem(self, value: dict[str, Any]) -> str | None:
        """What is wrong with an answer, or None."""
        missing = sorted(self.required - set(value))
        if missing:
            return f"the key {missing[0]!r} is missing"
        for key, names in sorted(self.functions.items()):
            if value[key] not in names:
                return f"{key} {value[key]!r} does not occur in training"
        for path, leaf in _paths(value):
            kinds = self.types.get(path)
            if kinds is None:
                return f"the key {'.'.join(path)!r} does not occur in training"
            if _type(leaf) not in kinds:
                return f"{'.'.join(path)!r} is a {_type(leaf)}, not a {' or '.join(sorted(kinds))}"
        return None


@dataclass(frozen=True)
class AnswerRules:
    """The rules of one task and data set."""

    task: Task
    labels: tuple[str, ...] = ()
    shape: Shape | None = None

    @classmethod
    def of(cls, task: Task, labels: Sequence[str], answers: Iterable[str]) -> AnswerRules:
        """Rules from the task, the labels of the data set and the training answers."""
        if task.type == "classification":
            known = task.labels or tuple(labels) or tuple(sorted(set(answers)))
            return cls(task, tuple(known))
        return cls(task, (), Shape.of(answers) if task.type == "extraction" else None)

    def tidy(self, text: str) -> str:
        """The answer without what talkative models put around it: thinking, code fences, `Label:`, quotes.

        A label is given as it is spelled in the data, JSON in the layout of the training answers.
        """
        text = without_thinking(text).strip()
        if fenced := _FENCE.match(text):
            text = fenced[1].strip()
        if self.task.type == "classification":
            return self._label(text)
        if self.task.type == "extraction" and isinstance(value := parse_object(text), dict):
            return dump(value, compact=self.shape is not None and self.shape.compact)
        return text

    def _label(self, text: str) -> str:
        if text in self.labels:
            return text
        folded = {label.casefold(): label for label in reversed(self.labels)}
        for form in (text, _LEAD.sub("", text)):
            bare = form.strip().strip("\"'`*.!").strip()
            for spelling in (bare, bare.replace(" ", "_"), bare.replace("_", " ")):
                if spelling.casefold() in folded:
                    return folded[spelling.casefold()]
        return text

    def vote_key(self, text: str) -> str:
        """Two answers count as the same vote if their keys are equal: JSON by value, other text without case and space."""
        if self.task.type == "extraction" and isinstance(value := parse_object(text), dict):
            return canonical_json(value)
        if self.task.type == "classification":
            return text.strip()
        return " ".join(text.casefold().split()).rstrip(".!")

    def problem(self, text: str) -> str | None:
        """What is wrong with an answer, or None."""
        if not text.strip():
            return "empty"
        if self.task.type == "classification" and self.labels and text not in self.labels:
            return "not one of the labels"
        if self.task.type == "extraction":
            value = parse_object(text)
            if not isinstance(value, dict):
                return value
            return self.shape.problem(value) if self.shape is not None else None
        return None


def without_thinking(text: str) -> str:
    """A reply without the thoughts that some models write before it."""
    return _THINKING.sub("", text, count=1)


def parse_object(text: str) -> dict[str, Any] | str:
    """The JSON object that a text is, or in words why it is none. NaN and repeated keys are refused."""
    try:
        value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return value if isinstance(value, dict) else "not a JSON object"


def dump(value: dict[str, Any], *, compact: bool) -> str:
    """JSON text of an answer, keys in their order, with or without spaces after `,` and `:`."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":") if compact else (", ", ": "))


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key comes twice")
    return value


def _paths(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every key path of a JSON value with what stands there; list items share the path of their list with `[]`."""
    out: list[tuple[tuple[str, ...], Any]] = [(path, value)] if path else []
    if isinstance(value, dict):
        for key in value:
            out.extend(_paths(value[key], (*path, key)))
    elif isinstance(value, list):
        for item in value:
            out.extend(_paths(item, (*path, "[]")))
    return out


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], Any]]:
    """Every value of a JSON value that is neither object nor list, with its path of keys and indices, in their order."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in leaves(value[key], (*path, key))]
    if isinstance(value, list):
        return [leaf for index, item in enumerate(value) for leaf in leaves(item, (*path, index))]
    return [(path, value)]


def with_leaves(value: Any, changes: Mapping[tuple[str | int, ...], Any], path: tuple[str | int, ...] = ()) -> Any:
    """A copy of a JSON value with other values at some paths of `leaves`; keys keep their order."""
    if isinstance(value, dict):
        return {key: with_leaves(value[key], changes, (*path, key)) for key in value}
    if isinstance(value, list):
        return [with_leaves(item, changes, (*path, index)) for index, item in enumerate(value)]
    return changes.get(path, value)


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return {str: "string", dict: "object", list: "list", type(None): "null"}[type(value)]
