"""Whether examples fit their task: labels that can be learned, answers that are JSON objects, one answer per prompt.

Preference pairs are the exception to one answer per prompt: all different pairs of a prompt stay, for they say different
things; see `merge_copies`.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from slmops.core.example import Example, Message
from slmops.core.spec import Task
from slmops.data.readers import Problems, Record, Split
from slmops.data.readers.text import parse_json
from slmops.errors import DataError


def fit(record: Record, task: Task, problems: Problems) -> Record:
    """The record as the task wants it: with the instruction as system message, and its answer in canonical form.

    A label loses white space around it; a JSON object gets one text (`{"name": "x", "arguments": {…}}`, keys in their
    order). An answer that is not one of `task.labels`, or not a JSON object, goes to `problems`. A rejected answer is put
    in the same form where it can be; it may be no label and no JSON, but not the same as the chosen one.
    """
    example = record.example
    if task.instruction.strip() and not any(m.role == "system" for m in example.prompt):
        example = replace(example, prompt=(Message("system", task.instruction), *example.prompt))
    if example.answer is not None and task.type == "classification":
        example = replace(example, answer=example.answer.strip())
        allowed = allowed_labels(task)
        if allowed is not None and example.answer not in allowed:
            close = difflib.get_close_matches(example.answer or "", allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "add it to task.labels, or correct the row"
            problems.add(f"label {example.answer!r} is not in task.labels", hint, file=record.file, line=record.line)
    if example.answer is not None and task.type == "extraction":
        try:
            example = replace(example, answer=canonical_object(example.answer))
        except ValueError as error:
            hint = "an extraction answer is one JSON object"
            problems.add(f"the answer is not a JSON object: {error}", hint, file=record.file, line=record.line)
    if example.rejected is not None and example.answer is not None:
        example = replace(example, rejected=_in_form(example.rejected, task))
        if example.rejected == example.answer:
            hint = "a pair needs two different answers: correct the row or take it out"
            problems.add("the chosen and the rejected answer are the same", hint, file=record.file, line=record.line)
    return replace(record, example=example)


def _in_form(rejected: str, task: Task) -> str:
    if task.type == "classification":
        return rejected.strip()
    try:
        return canonical_object(rejected) if task.type == "extraction" else rejected
    except ValueError:
        return rejected


def allowed_labels(task: Task) -> tuple[str, ...] | None:
    """`task.labels` with the out-of-scope label, or None where the file gives none."""
    if task.labels is None:
        return None
    extra = (task.out_of_scope,) if task.out_of_scope and task.out_of_scope not in task.labels else ()
    return (*task.labels, *extra)


def canonical_object(answer: str) -> str:
    """One text for a JSON object: separators `, ` and `: `, no escapes beyond what JSON needs, keys in their order.

    Raises:
        ValueError: not JSON, not an object, a key twice, NaN.
    """
    value = parse_json(answer)
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}")
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def check_labels(task: Task, splits: Mapping[Split, Sequence[Example]], where: str) -> tuple[list[str], list[str]]:
    """The sorted labels of a classification task, and those of `task.labels` that training has no example of.

    Raises:
        DataError: one label only; no labelled training examples and no `task.labels`; a label in test or validation
            that training does not have (the out-of-scope label may be missing there).
    """
    trained = Counter(e.answer for e in splits["train"] if e.answer is not None)
    allowed = allowed_labels(task)
    if not trained and allowed is None:
        hint = "label some rows, or list the labels in task.labels"
        raise DataError("no training row has a label", hint, file=where)
    known = sorted({*trained, *(allowed or ())})
    if len(known) < 2:
        hint = "classification needs at least two; check data.columns.answer"
        raise DataError(f"the training data has one label only: {known[0]!r}", hint, file=where)
    learnable = set(trained) or set(known)
    for split in ("test", "validation"):
        unseen = Counter(e.answer for e in splits[split] if e.answer not in learnable and e.answer != task.out_of_scope)
        if unseen:
            listing = ", ".join(f"{label!r} ({count})" for label, count in sorted(unseen.items(), key=str)[:10])
            more = f" and {len(unseen) - 10} more" if len(unseen) > 10 else ""
            raise DataError(
                f"{split} has labels that no training example has: {listing}{more}",
                "add training examples for them, correct the labels, or take those rows out",
                file=where,
            )
    if task.out_of_scope and task.out_of_scope not in known:
        known = sorted([*known, task.out_of_scope])
    return known, [label for label in allowed or () if trained and label not in trained]


def merge_copies(examples: Sequence[Example]) -> tuple[list[Example], list[tuple[Example, Example]]]:
    """One example per prompt: the answer that most copies give, on a tie the one whose text comes first.

    A prompt with preference pairs keeps one example of each pair, and none without a pair. Of a pair and its reverse stays
    the one that more rows give, on a tie the one whose chosen text comes first.

    Returns:
        The examples kept, in the order of their ids, and (kept, removed) for every copy that went.
    """
    copies: dict[str, list[Example]] = {}
    for example in examples:
        copies.setdefault(example.id, []).append(example)
    kept: list[Example] = []
    removed: list[tuple[Example, Example]] = []
    for key in sorted(copies):
        if any(e.rejected is not None for e in copies[key]):
            best = _pairs_of(copies[key])
            kept += best
            removed += [(_nearest(best, other), other) for other in copies[key] if not any(other is e for e in best)]
            continue
        votes = Counter(e.answer for e in copies[key] if e.answer is not None)
        winner = min(votes, key=lambda answer: (-votes[answer], answer)) if votes else None
        group = sorted(copies[key], key=lambda e: (e.answer != winner, e.answer or "", e.source))
        kept.append(group[0])
        removed += [(group[0], other) for other in group[1:]]
    return kept, removed


def _pairs_of(copies: Sequence[Example]) -> list[Example]:
    """One example of each preference pair among examples of one prompt; see `merge_copies`."""
    pairs = sorted((e for e in copies if e.rejected is not None), key=lambda e: (e.answer or "", e.rejected, e.source))
    votes = Counter((e.answer, e.rejected) for e in pairs)
    kept: dict[frozenset[str | None], Example] = {}
    for example in pairs:
        both = frozenset((example.answer, example.rejected))
        before = kept.setdefault(both, example)
        if votes[example.answer, example.rejected] > votes[before.answer, before.rejected]:
            kept[both] = example
    return list(kept.values())


def _nearest(kept: Sequence[Example], other: Example) -> Example:
    """The kept example that stands for another: the one of the same two answers, else the first."""
    both = {other.answer, other.rejected}
    return next((e for e in kept if {e.answer, e.rejected} == both), kept[0])
