"""Scores of answers against gold answers, example by example, in pure Python.

Every metric but one is a ratio of sums over the examples: `columns` gives each example's part of the sum above and
below the line, and the score is the one sum divided by the other. A plain mean has ones below the line. The exception
is macro-F1, which is made of counts per label. How sure a score is stands in `statistics`, not here.

A label or text is compared after stripping white space at both ends, and otherwise character by character.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slmops.core.spec import GateSpec, Metric, Task, TaskType
from slmops.errors import MissingExtraError, UsageError

DEFAULTS: dict[TaskType, tuple[Metric, ...]] = {
    "classification": ("accuracy", "macro_f1"),
    "extraction": ("exact_match", "field_f1", "valid"),
    "question_answering": ("exact_match", "token_f1"),
    "summarisation": ("rouge_l",),
    "chat": ("exact_match", "rouge_l"),
    "generation": ("exact_match", "rouge_l"),
}
"""Metrics of a task for which the project file names none. The first is the one that models are compared by."""

BINARY: frozenset[Metric] = frozenset({"accuracy", "exact_match", "valid", "in_scope_accuracy", "out_of_scope_recall"})
"""Metrics whose per-example score is 0 or 1."""

DEEPEST = 100
"""A JSON answer nested deeper than this counts as not parsed."""

Path = tuple[str, ...]
Leaf = tuple[Path, str]


@dataclass(frozen=True)
class Columns:
    """One metric over n examples: the score is `sum(above) / sum(below)`."""

    above: tuple[float, ...]
    below: tuple[float, ...]

    @property
    def value(self) -> float | None:
        """The score, or None where nothing is below the line (no example that the metric looks at)."""
        total = sum(self.below)
        return sum(self.above) / total if total else None

    @property
    def n(self) -> int:
        """How many examples the metric looks at."""
        return sum(1 for part in self.below if part)


def metrics_for(
    task: Task, chosen: Sequence[Metric] | None = None, gates: Sequence[GateSpec] = ()
) -> tuple[Metric, ...]:
    """The metrics to compute: the chosen ones (or the task's defaults), then those that gates ask for.

    Raises:
        UsageError: a metric does not fit the task.
    """
    names: list[Metric] = list(chosen) if chosen else list(DEFAULTS[task.type])
    if not chosen and task.type == "classification" and task.out_of_scope is not None:
        names += ["in_scope_accuracy", "out_of_scope_recall"]
    names += [gate.metric for gate in gates if gate.metric in _SCORES and gate.metric not in names]  # type: ignore[misc]
    for name in names:
        if name in ("in_scope_accuracy", "out_of_scope_recall") and task.out_of_scope is None:
            raise UsageError(f"{name} needs to know the label that is out of scope", "set task.out_of_scope")
        if name == "macro_f1" and task.type != "classification":
            raise UsageError(f"macro_f1 does not fit a task of type {task.type}", "use exact_match or token_f1")
        if name == "field_f1" and task.type != "extraction":
            raise UsageError(f"field_f1 does not fit a task of type {task.type}", "use token_f1 or rouge_l")
    return tuple(dict.fromkeys(names))


def columns(
    metric: Metric, golds: Sequence[str], answers: Sequence[str], task: Task, labels: Sequence[str] = ()
) -> Columns:
    """Per-example parts of a metric other than `macro_f1`.

    Args:
        golds, answers: n texts each, in the same order.
        labels: the allowed labels, for `valid` in a classification.
    """
    if metric == "macro_f1":
        raise ValueError("macro_f1 is not a ratio of sums; use macro_f1()")
    pairs = list(zip(golds, answers, strict=True))
    if metric == "field_f1":
        counts = [field_counts(gold, answer) for gold, answer in pairs]
        totals = [tuple(sum(c[i] for c in per_field.values()) for i in range(3)) for per_field in counts]
        return Columns(tuple(2.0 * t[0] for t in totals), tuple(float(2 * t[0] + t[1] + t[2]) for t in totals))
    if metric in ("in_scope_accuracy", "out_of_scope_recall"):
        inside = metric == "in_scope_accuracy"
        looked_at = [(gold.strip() != task.out_of_scope) == inside for gold in golds]
        hits = [float(look and g.strip() == a.strip()) for look, (g, a) in zip(looked_at, pairs, strict=True)]
        return Columns(tuple(hits), tuple(float(look) for look in looked_at))
    score = _per_example(metric, task.type, frozenset(label.strip() for label in labels))
    return Columns(tuple(score(gold, answer) for gold, answer in pairs), (1.0,) * len(pairs))


def _per_example(metric: Metric, task: TaskType, labels: frozenset[str]) -> Callable[[str, str], float]:
    if metric == "exact_match" and task == "extraction":
        return lambda gold, answer: float(same_json(gold, answer))
    if metric == "exact_match" and task == "question_answering":
        return lambda gold, answer: float(normalise(gold) == normalise(answer))
    if metric in ("accuracy", "exact_match"):
        return lambda gold, answer: float(gold.strip() == answer.strip())
    if metric == "token_f1":
        return token_f1
    if metric == "rouge_l":
        return rouge_l()
    if metric == "valid" and task == "extraction":
        return lambda _gold, answer: float(parse(answer) is not None)
    if metric == "valid" and task == "classification":
        return lambda _gold, answer: float(answer.strip() in labels)
    if metric == "valid":
        return lambda _gold, answer: float(bool(answer.strip()))
    raise ValueError(f"unknown metric {metric}")


_SCORES = frozenset(BINARY | {"macro_f1", "field_f1", "rouge_l", "token_f1"})


# Labels


def macro_f1(golds: Sequence[str], answers: Sequence[str]) -> float | None:
    """Mean over the labels that occur in `golds` of each label's F1.

    An answer that is no label at all lowers the recall of the gold label and makes no class of its own.
    """
    stripped = [(gold.strip(), answer.strip()) for gold, answer in zip(golds, answers, strict=True)]
    gold_counts, answer_counts = Counter(g for g, _ in stripped), Counter(a for _, a in stripped)
    hits = Counter(g for g, a in stripped if g == a)
    if not gold_counts:
        return None
    return sum(2 * hits[x] / (gold_counts[x] + answer_counts[x]) for x in gold_counts) / len(gold_counts)


# JSON answers


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def parse(text: str) -> dict[str, Any] | None:
    """The JSON object that an answer is, or None. White space around it is fine; anything else around it is not."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _depth(value) <= DEEPEST else None


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return depth


def _scalar(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return json.dumps(value, ensure_ascii=False)


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_canonical(inner) for inner in value]
    return _scalar(value)


def same_json(gold: str, answer: str) -> bool:
    """Whether two texts are the same JSON object: key order does not count, list order does, 1 is 1.0 but not true."""
    left, right = parse(gold), parse(answer)
    if left is None:
        return gold.strip() == answer.strip()
    return right is not None and _canonical(left) == _canonical(right)


def flatten(value: Any, path: Path = ()) -> list[Leaf]:
    """Leaves of a JSON value as (path, canonical text). The items of a list share the path step `[]`."""
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in flatten(inner, (*path, key))]
    if isinstance(value, list) and value:
        return [leaf for inner in value for leaf in flatten(inner, (*path, "[]"))]
    return [(path, json.dumps(value) if isinstance(value, dict | list) else _scalar(value))]


def field_name(path: Path) -> str:
    """How a path is shown: `arguments.items[]`."""
    return ".".join(path).replace(".[]", "[]")


def field_counts(gold: str, answer: str) -> dict[str, tuple[int, int, int]]:
    """Per field: leaves that are right, only in the answer, only in gold. Items of a list count in any order."""
    wanted = parse(gold)
    given = parse(answer)
    left: Counter[Leaf] = Counter(flatten(wanted)) if wanted is not None else Counter([((), gold.strip())])
    right: Counter[Leaf] = Counter(flatten(given)) if given is not None else Counter()
    if wanted is None and answer.strip() == gold.strip():
        right = left
    out: dict[str, tuple[int, int, int]] = {}
    for path, text in left.keys() | right.keys():
        both = min(left[path, text], right[path, text])
        right_, extra, missed = out.get(field_name(path), (0, 0, 0))
        out[field_name(path)] = (right_ + both, extra + right[path, text] - both, missed + left[path, text] - both)
    return out


# Free text

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces: how SQuAD compares answers."""
    lowered = unicodedata.normalize("NFC", text).lower()
    plain = "".join(c for c in lowered if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", plain).split())


def token_f1(gold: str, answer: str) -> float:
    """F1 of the words that two normalised texts share, each counted as often as it occurs; 1 if both have none."""
    left, right = normalise(gold).split(), normalise(answer).split()
    if not left or not right:
        return float(left == right)
    common = sum((Counter(left) & Counter(right)).values())
    return 2 * common / (len(left) + len(right))


class _Words:
    """A tokenizer for rouge-score that keeps letters of every script."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def rouge_l() -> Callable[[str, str], float]:
    """A function of gold and answer: F-measure of the longest common subsequence of words; 1 if both have none.

    Raises:
        MissingExtraError: the package rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError("rouge-score", "evaluate") from error
    words = _Words()
    scorer = RougeScorer(["rougeL"], tokenizer=words)

    def score(gold: str, answer: str) -> float:
        if not words.tokenize(gold) or not words.tokenize(answer):
            return float(words.tokenize(gold) == words.tokenize(answer))
        return float(scorer.score(gold, answer)["rougeL"].fmeasure)

    return score
