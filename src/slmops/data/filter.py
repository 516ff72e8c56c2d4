"""`data.filter`: which of the teacher's answers the student may learn from.

Promises: nothing that overlaps with validation or test data passes; each row is either in train.jsonl or in
dropped.jsonl with its reason; the same inputs give the same bytes. Gold examples stay where they are: train.jsonl holds
the teacher's answers alone, and a prompt that says the same as a gold one is dropped as a duplicate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from slmops.core.engine import Sampling
from slmops.core.example import Example
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import ENDPOINT_NEUTRAL, Endpoint, Filters, Generate, Overlap, Task
from slmops.errors import DataError, LeakError

if TYPE_CHECKING:
    from slmops.core.validity import AnswerRules

DECLARATION = Declaration(
    name="data.filter",
    version="1",
    makes="dataset",
    takes={"answers?": "dataset", "answers.*": "dataset", "data": "dataset", "teacher?": "model"},
    neutral=ENDPOINT_NEUTRAL,
)

SHOWN = 5
"""Dropped examples of each filter that stats.json shows."""
GENERATED = get_args(Generate.model_fields["method"].annotation)
"""What `source` says of a prompt that was generated: the method."""


class Params(BaseParams):
    """The filters; `overlap` says when a prompt counts as a copy of evaluation data. `endpoint` is the judge's."""

    filters: Filters = Filters()
    task: Task
    overlap: Overlap = Overlap()
    endpoint: Endpoint | None = None


@dataclass(frozen=True)
class Row:
    """An answered example with what data.answer knew of it."""

    example: Example
    finished: bool
    agreement: float


Drops = dict[int, tuple[str, str]]
"""Position among the rows that are looked at → reason, detail."""


def _place(name: str) -> int:
    """Of a part of the answers, from its input's name: `answers` or `answers.N`."""
    return int(name.partition(".")[2] or 0)


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write train.jsonl, dropped.jsonl and stats.json.

    Raises:
        DataError: nothing is left; says which filter dropped most.
        LeakError: a prompt of the pool overlaps with evaluation data and `ctx.strict` is set.
        EndpointError, BudgetError: the judge failed; what was paid for is kept.
    """
    from slmops.data.answer import load_rules
    from slmops.store.rows import read_examples, read_rows, write_json, write_rows

    filters, data = params.filters, inputs["data"]
    rows = [
        Row(Example.from_json(row), bool(row.get("finished", True)), float(row.get("agreement", 1.0)))
        for part in sorted((name for name in inputs if name.startswith("answers")), key=_place)
        for row in read_rows(inputs[part] / "answers.jsonl")
    ]
    rules = load_rules(params.task, data)
    gold = read_examples(data / "gold.jsonl")
    evaluation = [e for name in ("validation", "test") for e in read_examples(data / f"{name}.jsonl")]
    text = _Texts([*gold, *evaluation, *(row.example for row in rows)])

    stages: list[tuple[str, Callable[[Sequence[Row]], Drops]]] = []
    if filters.valid:
        stages.append(("valid", lambda left: _invalid(left, rules)))
    stages.append(("length", lambda left: _length(left, filters)))
    stages.append(("agreement", lambda left: _agreement(left, filters.min_agreement)))
    stages.append(("contamination", lambda left: _contaminated(left, evaluation, params, text)))
    stages.append(("duplicate", lambda left: _duplicates(left, gold, filters.near_duplicate, text)))
    if filters.judge:
        stages.append(("judge", lambda left: _judged(left, rules, params, inputs, ctx)))

    left = rows
    dropped: list[dict[str, Any]] = []
    per_stage: dict[str, Any] = {}
    for name, stage in stages:
        drops = stage(left)
        per_stage[name] = _summary(left, drops)
        dropped += [_dropped_row(left[index], name, *drops[index]) for index in sorted(drops)]
        if name == "contamination" and drops:
            _say_leak(left, drops, ctx)
        left = [row for index, row in enumerate(left) if index not in drops]
    if rows and not left:
        worst = max(per_stage, key=lambda name: per_stage[name]["dropped"])
        shown = per_stage[worst]["examples"][0]
        raise DataError(
            f"the filters left none of {len(rows)} answers; `{worst}` dropped {per_stage[worst]['dropped']}, "
            f"for instance {shown['answer']!r} to {shown['prompt']!r} ({shown['reason']}: {shown['detail']})",
            "look whether the teacher knows the task, or loosen synthesize.filters",
        )
    labels = _histogram(row.example.answer or "" for row in left)
    stats: dict[str, Any] = {
        "seen": len(rows),
        "kept": len(left),
        "dropped": len(rows) - len(left),
        "filters": per_stage,
        "sources": _histogram(row.example.source or "pool" for row in left),
    }
    if params.task.type == "classification":
        stats["labels"] = labels
        stats["labels_without_examples"] = [label for label in rules.labels if label not in labels]
    write_rows(out / "train.jsonl", (row.example.to_json() for row in left))
    write_rows(out / "dropped.jsonl", dropped)
    write_json(out / "stats.json", stats)
    counts = {name: summary["dropped"] for name, summary in per_stage.items()}
    return {"seen": len(rows), "kept": len(left), "dropped": counts}


def _invalid(rows: Sequence[Row], rules: AnswerRules) -> Drops:
    drops: Drops = {}
    for index, row in enumerate(rows):
        if not row.finished:
            drops[index] = ("unfinished", "cut by the length limit")
        elif (problem := rules.problem(row.example.answer or "")) is not None:
            drops[index] = ("invalid", problem)
    return drops


def _length(rows: Sequence[Row], filters: Filters) -> Drops:
    drops: Drops = {}
    for index, row in enumerate(rows):
        size = len(row.example.text.strip())
        if size < filters.min_characters:
            drops[index] = ("too short", f"{size} characters")
        elif size > filters.max_characters:
            drops[index] = ("too long", f"{size} characters")
    return drops


def _agreement(rows: Sequence[Row], least: float) -> Drops:
    return {
        index: ("disagreement", f"{row.agreement:.2f} of the votes")
        for index, row in enumerate(rows)
        if row.agreement < least - 1e-6
    }


class _Texts:
    """The text by which two prompts count as the same, one definition for all examples of a step."""

    def __init__(self, examples: Sequence[Example]) -> None:
        from slmops.data.splits import compared_texts

        self._by_id = dict(zip((e.id for e in examples), compared_texts(examples), strict=True))

    def __call__(self, examples: Iterable[Example]) -> list[str]:
        return [self._by_id[example.id] for example in examples]


def _contaminated(rows: Sequence[Row], evaluation: Sequence[Example], params: Params, text: _Texts) -> Drops:
    from slmops.data.overlap import find_overlaps

    threshold = params.overlap.near_duplicate or 1.0
    ngram = params.filters.ngram or params.overlap.ngram
    found = find_overlaps(text(row.example for row in rows), text(evaluation), threshold, ngram=ngram)
    return {
        o.candidate_index: (
            _SAME[o.kind] + " evaluation data",
            f"{o.similarity:.2f}: {evaluation[o.reference_index].text}",
        )
        for o in found
    }


_SAME = {"exact": "copy of", "near": "nearly the same as", "ngram": "shares a run of words with"}


def _duplicates(rows: Sequence[Row], gold: Sequence[Example], threshold: float, text: _Texts) -> Drops:
    from slmops.data.overlap import drop_near_duplicates, find_overlaps

    threshold = threshold or 1.0
    texts = text(row.example for row in rows)
    drops: Drops = {
        o.candidate_index: (_SAME[o.kind] + " gold", f"{o.similarity:.2f}: {gold[o.reference_index].text}")
        for o in find_overlaps(texts, text(gold), threshold)
    }
    rest = [index for index in range(len(texts)) if index not in drops]
    for o in drop_near_duplicates([texts[index] for index in rest], threshold)[1]:
        kept = rows[rest[o.reference_index]].example.text
        drops[rest[o.candidate_index]] = (_SAME[o.kind] + " one kept", f"{o.similarity:.2f}: {kept}")
    return drops


def _judged(rows: Sequence[Row], rules: AnswerRules, params: Params, inputs: Mapping[str, Path], ctx: Context) -> Drops:
    from slmops.core import prompting
    from slmops.data.teacher import open_teacher

    teacher = open_teacher(inputs, params.endpoint, ctx)
    try:
        limit, temperature = 16, 0.0
        if params.endpoint is not None and teacher.remote:  # a model that thinks first needs room for it
            limit, temperature = params.endpoint.max_output_tokens, params.endpoint.temperature
        asked = [prompting.judge(row.example, rules) for row in rows]
        replies = teacher.answers(asked, Sampling(limit, temperature, seed=ctx.seed))
    finally:
        teacher.close()
    verdicts = [prompting.read_verdict(reply.text) if reply is not None else None for (reply,) in replies]
    unclear = verdicts.count(None)
    if unclear:
        ctx.progress.log(f"the judge gave no clear verdict on {unclear} of {len(rows)} answers; they are kept")
    return {
        index: ("judged wrong", f"the judge said no ({teacher.name})") for index, v in enumerate(verdicts) if v is False
    }


def _say_leak(rows: Sequence[Row], drops: Drops, ctx: Context) -> None:
    """Strictly, a prompt of the user's own data that repeats evaluation data is an error; a generated one is chance."""
    own = [index for index in sorted(drops) if rows[index].example.source not in GENERATED]
    if ctx.strict and own:
        reason, detail = drops[own[0]]
        raise LeakError(
            f"{len(own)} prompts of the pool overlap with evaluation data; the first is a {reason} ({detail})",
            "without --strict they are dropped, counted and shown",
        )
    ctx.progress.log(f"{len(drops)} of {len(rows)} prompts overlap with evaluation data and were dropped")


def _summary(rows: Sequence[Row], drops: Drops) -> dict[str, Any]:
    shown = [
        {"prompt": rows[i].example.text, "answer": rows[i].example.answer, "reason": drops[i][0], "detail": drops[i][1]}
        for i in sorted(drops)[:SHOWN]
    ]
    return {"dropped": len(drops), "reasons": _histogram(reason for reason, _ in drops.values()), "examples": shown}


def _dropped_row(row: Row, name: str, reason: str, detail: str) -> dict[str, Any]:
    return row.example.to_json() | {"filter": name, "reason": reason, "detail": detail}


def _histogram(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
