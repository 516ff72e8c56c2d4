"""`data.augment`: further copies of answered examples, changed so that the answer stays right.

`swap` (extraction): an argument value that stands exactly once in the user's message is replaced, in message and answer
alike, by another value of that argument or by one of made-up words. A model that sees the same sentence with many values
learns to copy instead of to remember (data recombination, arXiv 1606.03622).

Promises: the originals are not repeated; no copy says the same as an original, another copy or an evaluation prompt;
values come from the examples that are given and from no others; the same inputs and seed give the same bytes. Each copy
names the example that it was made from (`parent`), so that copies of a held-out example are not trained on.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slmops.core.example import Example
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Augment, Overlap
from slmops.core.validity import FUNCTION_KEYS, dump, leaves, parse_object, with_leaves
from slmops.errors import DataError

DECLARATION = Declaration(
    name="data.augment",
    version="1",
    makes="dataset",
    takes={"data": "dataset", "synthetic?": "dataset"},
    extra="data",
    packages=("datasketch",),
)

KEPT = 0.25
"""Share of the values that stay as they are in a copy (never all of them)."""
TRIES = 4
"""Tries for each copy wanted, since some repeat what is there."""

Path_ = tuple[str | int, ...]


class Params(BaseParams):
    """What is copied: `files` are `input/file` of answered examples; `overlap` says what counts as evaluation data."""

    augment: Augment
    files: tuple[str, ...]
    overlap: Overlap = Overlap()


@dataclass(frozen=True)
class Place:
    """A value of an answer that can be swapped: its path in the answer, function and argument it belongs to, where it stands."""

    path: Path_
    argument: tuple[str, ...]
    start: int
    end: int


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write train.jsonl (the copies alone) and stats.json.

    Raises:
        DataError: a file is missing, or no example has a value that could be swapped.
    """
    from slmops.data.overlap import find_overlaps, normalise
    from slmops.data.splits import compared_texts
    from slmops.store.rows import read_examples, write_json, write_rows

    examples: list[Example] = []
    for entry in params.files:
        name, _, file = entry.partition("/")
        if name not in inputs or not (inputs[name] / file).is_file():
            raise DataError(f"{entry}: no such file", f"inputs are: {', '.join(sorted(inputs))}")
        examples += [e for e in read_examples(inputs[name] / file) if e.answer is not None]
    pools, places = _survey(examples)
    if examples and not any(places):
        raise DataError(
            f"none of {len(examples)} examples has an answer value that stands once in its message",
            "swapping is for answers that copy words from the message; take data.augment out",
        )
    rng = random.Random(ctx.seed)
    maker = _Maker(examples, rng)
    seen = {normalise(example.text) for example in examples}
    copies: list[Example] = []
    for example, own in zip(examples, places, strict=True):
        made = 0
        for _ in range(TRIES * params.augment.copies if own else 0):
            copy = _swapped(example, own, pools, maker, params.augment.made_up)
            form = normalise(copy.text) if copy is not None else ""
            if copy is None or form in seen:
                continue
            seen.add(form)
            copies.append(copy)
            made += 1
            if made == params.augment.copies:
                break
    evaluation = [e for name in ("validation", "test") for e in read_examples(inputs["data"] / f"{name}.jsonl")]
    texts = compared_texts([*copies, *evaluation])
    near = params.overlap.near_duplicate or 1.0
    found = find_overlaps(texts[: len(copies)], texts[len(copies) :], near, ngram=params.overlap.ngram)
    leaks = {overlap.candidate_index for overlap in found}
    kept = [copy for index, copy in enumerate(copies) if index not in leaks]
    if leaks:
        ctx.progress.log(f"{len(leaks)} copies came close to evaluation data and were dropped")
    stats: dict[str, Any] = {
        "method": params.augment.method,
        "seen": len(examples),
        "with_values": sum(map(bool, places)),
        "kept": len(kept),
        "dropped_as_evaluation_data": len(leaks),
        "novelty": {".".join(name): round(pool.novelty, 3) for name, pool in sorted(pools.items())},
        "examples": [[copy.text, copy.answer] for copy in kept[:5]],
    }
    write_rows(out / "train.jsonl", (copy.to_json() for copy in kept))
    write_json(out / "stats.json", stats)
    return {key: stats[key] for key in ("seen", "with_values", "kept", "dropped_as_evaluation_data")}


@dataclass(frozen=True)
class Pool:
    """The values that an argument has in the examples, sorted.

    Attributes:
        novelty: how likely a next value is one that was not seen: the share of the values that stand there once (the
            estimate of Good and Turing). Near 1 for names, 0 for units: only where it is high are made-up values right.
    """

    values: tuple[str, ...]
    novelty: float

    @classmethod
    def of(cls, counts: Counter[str]) -> Pool:
        """The pool of counted values."""
        return cls(tuple(sorted(counts)), sum(count == 1 for count in counts.values()) / counts.total())


def _survey(examples: Sequence[Example]) -> tuple[dict[tuple[str, ...], Pool], list[list[Place]]]:
    """The values of each argument, and for each example the places that can be swapped, from left to right."""
    counts: dict[tuple[str, ...], Counter[str]] = {}
    places: list[list[Place]] = []
    for example in examples:
        answer = parse_object(example.answer or "")
        own: list[Place] = []
        function = _function(answer)
        for path, value in leaves(answer) if isinstance(answer, dict) else ():
            argument = (*function, *(part if isinstance(part, str) else "[]" for part in path))
            if not isinstance(value, str) or not value.strip() or (len(path) == 1 and path[0] in FUNCTION_KEYS):
                continue
            counts.setdefault(argument, Counter())[value] += 1
            if (span := _once(value, example.text)) is not None:
                own.append(Place(path, argument, *span))
        own.sort(key=lambda place: (place.start, -place.end))
        places.append([p for i, p in enumerate(own) if i == 0 or all(p.start >= q.end for q in own[:i])])
    return {argument: Pool.of(found) for argument, found in counts.items()}, places


def _function(answer: dict[str, Any] | str) -> tuple[str, ...]:
    """What the answer calls: arguments of one name have other values in other functions."""
    values = [answer.get(key) for key in FUNCTION_KEYS] if isinstance(answer, dict) else []
    return tuple(value for value in values if isinstance(value, str))


def _once(value: str, text: str) -> tuple[int, int] | None:
    """Where a value stands in a text as whole words, if it stands there exactly once."""
    found = list(re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", text))
    return found[0].span() if len(found) == 1 and text.count(value) == 1 else None


def _swapped(
    example: Example, places: Sequence[Place], pools: Mapping[tuple[str, ...], Pool], maker: _Maker, made_up: float
) -> Example | None:
    """The example with some of its values swapped; None if all of them stayed the same."""
    rng = maker.rng
    answer = parse_object(example.answer or "")
    assert isinstance(answer, dict)
    sure = rng.randrange(len(places))
    text, changes, at = [], {}, 0
    for number, place in enumerate(places):
        pool, old = pools[place.argument], example.text[place.start : place.end]
        new = old
        if number == sure or rng.random() >= KEPT:
            new = rng.choice(pool.values)
            if rng.random() < made_up * pool.novelty:
                new = maker.value(new)
        text += [example.text[at : place.start], new]
        at = place.end
        if new != old:
            changes[place.path] = new
    if not changes:
        return None
    written = dump(with_leaves(answer, changes), compact=example.answer == dump(answer, compact=True))
    copy = example.with_text("".join([*text, example.text[at:]]))
    return replace(copy, answer=written, source="swap", parent=example.parent or example.id)


class _Maker:
    """Makes words up from the beginnings and ends of words that stand in the examples."""

    def __init__(self, examples: Iterable[Example], rng: random.Random) -> None:
        self.rng = rng
        found = {word.casefold() for example in examples for word in re.findall(r"[^\W\d_]{4,}", example.text)}
        self.words: list[str] = sorted(found)

    def word(self) -> str:
        """A word of at least three letters."""
        head, tail = self.rng.choice(self.words), self.rng.choice(self.words)
        return head[: self.rng.randint(2, max(2, len(head) - 2))] + tail[-self.rng.randint(1, len(tail) - 2) :]

    def value(self, like: str) -> str:
        """A value in which most words of three letters or more are made up, in the case of the words they stand for."""

        def other(match: re.Match[str]) -> str:
            old = match[0]
            if not self.words or self.rng.random() < KEPT:
                return old
            new = self.word()
            return new.upper() if old.isupper() else new.capitalize() if old[0].isupper() else new

        return re.sub(r"[^\W\d_]{3,}", other, like)
