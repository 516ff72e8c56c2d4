"""The work of `data.prepare`: sharing out, removing leaks, merging copies, partitioning, writing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmops.core.digest import digest_bytes
from slmops.core.example import Example
from slmops.core.method import Context, Facts
from slmops.core.spec import Data, Task
from slmops.data.overlap import find_overlaps, normalise
from slmops.data.readers import SPLITS, Problems, Split, is_hub, read
from slmops.data.splits import compared_texts, place, ranked, take_per_stratum, take_share
from slmops.data.validate import check_labels, fit, merge_copies
from slmops.errors import DataError, LeakError

VALIDATION_SHARE = 0.1
TEST_SHARE = 0.15
SHOWN = 20


@dataclass
class Removed:
    """What was taken out, by kind: all counted, the first 20 shown."""

    counts: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[tuple[str, str, float]]] = field(default_factory=dict)

    def add(self, kind: str, kept: str, removed: str, similarity: float) -> None:
        """Note one example."""
        self.counts[kind] += 1
        examples = self.shown.setdefault(kind, [])
        if len(examples) < SHOWN:
            examples.append((kept, removed, round(similarity, 4)))

    def to_json(self) -> dict[str, Any]:
        """By kind, in the order of names."""
        return {k: {"count": self.counts[k], "examples": [list(e) for e in self.shown[k]]} for k in sorted(self.counts)}


def prepare(
    data: Data, task: Task, source: Path | None, out: Path, ctx: Context, *, needs_teacher: bool = True,
    needs_pairs: bool = False,
) -> Facts:  # fmt: skip
    """Write the prepared dataset into the empty folder `out` and return its counts; see `slmops.data.prepare`.

    Args:
        source: the file or folder that holds the data; None: `data.path` itself.
        needs_teacher: whether a teacher is trained here, on its share of the gold examples.
        needs_pairs: whether an answered training row without a rejected answer is an error.

    Raises:
        DataError, LeakError, MissingExtraError: as `slmops.data.prepare.run`.
    """
    check_settings(data, task)
    ctx.progress.start("reading the data")
    reading = read(data, None if is_hub(data.path) else source)
    problems = Problems()
    fitted: dict[Split, list[Example]] = {
        split: [fit(record, task, problems).example for record in records] for split, records in reading.splits.items()
    }
    for record in reading.splits["train"] if needs_pairs else ():
        if record.example.answer is not None and record.example.rejected is None:
            hint = "give chosen and rejected in every row, or data.columns.rejected; or use another train.method"
            problems.add("the row has no rejected answer", hint, file=record.file, line=record.line)
    problems.check()
    splits = _share_out(fitted, data)
    ctx.progress.stop()
    for split in SPLITS:
        ctx.progress.log(f"{split}: {len(splits[split])} examples")

    ctx.progress.start("looking for evaluation data in the training data")
    removed = Removed()
    splits = _without_leaks(splits, data, removed)
    ctx.progress.stop()
    _tell_leaks(removed, ctx)

    train = _merged(splits["train"], removed, ctx)
    train = _limited(train, data.max_examples, removed)
    labels, absent = _labels(task, {**splits, "train": train}, data, ctx)
    files = _partition(train, data, task, needs_teacher, ctx)
    for split in ("validation", "test"):
        files[split] = _in_order(splits[split])
    info = {
        "files": {name: _write(out / f"{name}.jsonl", examples, task) for name, examples in files.items()},
        "labels": labels,
        "labels_without_examples": absent,
        "columns": reading.columns,
        "parts": {split: list(reading.parts.get(split, ("by share",))) for split in SPLITS},
        "removed": removed.to_json(),
    }
    text = json.dumps(info, ensure_ascii=False, indent=1, sort_keys=True)
    (out / "info.json").write_text(text + "\n", encoding="utf-8")
    facts: Facts = {name: len(examples) for name, examples in files.items()}
    return {**facts, "labels": len(labels), "removed": dict(sorted(removed.counts.items()))}


def check_settings(data: Data, task: Task) -> None:
    """What can be refused before a file is opened.

    Raises:
        DataError: shares, thresholds or gold counts that cannot be.
    """
    validation, test = _shares(data)
    if validation + test >= 1:
        hint = "their sum must be below 1"
        raise DataError(f"data.splits: validation {validation} and test {test} leave nothing for training", hint)
    if data.overlap.near_duplicate <= 0:
        hint = "0.9 is the default; 1 means exact copies only"
        raise DataError("data.overlap.near_duplicate: 0 would make all texts copies of each other", hint)
    if data.gold.per_label is not None and task.type != "classification":
        raise DataError("data.gold.per_label needs a classification task", "use data.gold.total")


def _shares(data: Data) -> tuple[float, float]:
    """Shares of validation and test; 0 where the split is taken by name."""
    given, out = data.splits, []
    for value, default in ((given.validation, VALIDATION_SHARE), (given.test, TEST_SHARE)):
        out.append(default if value is None else 0.0 if isinstance(value, tuple) else value)
    return out[0], out[1]


def _share_out(fitted: dict[Split, list[Example]], data: Data) -> dict[Split, list[Example]]:
    """All three splits: those that are not there by name get their share of the training rows that have an answer."""
    validation, test = _shares(data)
    validation = 0.0 if "validation" in fitted else validation
    test = 0.0 if "test" in fitted else test
    out: dict[Split, list[Example]] = {split: list(fitted.get(split, ())) for split in SPLITS}
    if validation or test:
        whole, out["train"] = out["train"], []
        for example, text in zip(whole, _texts(fitted, "train"), strict=True):
            split = place(text, validation, test) if example.answer is not None else "train"
            out[split].append(example)
    for name in ("train", "test"):
        if not out[name]:
            answered = sum(e.answer is not None for e in fitted["train"])
            hint = f"{answered} rows have an answer: give more, or name the splits in data.splits"
            raise DataError(f"no examples for {name}", hint, file=data.path)
    return {split: _in_order(out[split]) for split in SPLITS}


def _texts(splits: Mapping[Split, Sequence[Example]], wanted: Split) -> list[str]:
    """The compared texts of one split, where the number of system messages is looked at over all of them."""
    every = [example for split in SPLITS for example in splits.get(split, ())]
    before = sum(len(splits.get(split, ())) for split in SPLITS[: SPLITS.index(wanted)])
    return compared_texts(every)[before : before + len(splits.get(wanted, ()))]


def _in_order(examples: Sequence[Example]) -> list[Example]:
    """One order for a set of examples, whatever order they came in."""
    return sorted(examples, key=lambda e: (e.id, e.answer or "", e.rejected or "", e.source))


def _without_leaks(splits: dict[Split, list[Example]], data: Data, removed: Removed) -> dict[Split, list[Example]]:
    """Training without copies of validation and test, validation without copies of test."""
    out = dict(splits)
    sides: tuple[tuple[Split, tuple[Split, ...]], ...] = (("validation", ("test",)), ("train", ("test", "validation")))
    for side, against in sides:
        references = [example for split in against for example in out[split]]
        reference_texts = [text for split in against for text in _texts(out, split)]
        texts = _texts(out, side)
        found = find_overlaps(texts, reference_texts, data.overlap.near_duplicate, data.overlap.ngram)
        for overlap in found:
            kept, gone = references[overlap.reference_index], out[side][overlap.candidate_index]
            removed.add(f"{side}_{overlap.kind}", kept.text, gone.text, overlap.similarity)
        gone_at = {overlap.candidate_index for overlap in found}
        out[side] = [example for index, example in enumerate(out[side]) if index not in gone_at]
        if splits[side] and not out[side]:
            hint = "the same file may have been given twice; or raise data.overlap.near_duplicate"
            raise DataError(f"every {side} example is a copy of a {' or '.join(against)} one", hint, file=data.path)
    return out


def _tell_leaks(removed: Removed, ctx: Context) -> None:
    leaks = {kind: count for kind, count in sorted(removed.counts.items()) if count}
    if not leaks:
        return
    lines = []
    for kind, count in leaks.items():
        side, how = kind.split("_")
        against = "test or validation" if side == "train" else "test"
        kept, gone, value = removed.shown[kind][0]
        lines.append(f"{count} {side} examples are {_HOW[how]} {against} ones ({value:.2f}: {gone!r} ~ {kept!r})")
    if ctx.strict:
        listing = "\n".join(f"  {line}" for line in lines)
        hint = "take them out of the training data; without --strict slmops removes them itself"
        raise LeakError(f"evaluation data stands in the training data:\n{listing}", hint)
    for line in lines:
        ctx.progress.log(f"removed: {line}")


_HOW = {"exact": "exact copies of", "near": "near copies of", "ngram": "sharing a long run of words with"}


def _merged(train: Sequence[Example], removed: Removed, ctx: Context) -> list[Example]:
    kept, copies = merge_copies(train)
    for one, other in copies:
        removed.add("duplicate", one.text, other.text, 1.0)
        if other.answer is not None and other.answer != one.answer:
            removed.add("conflict", f"{one.text} → {one.answer}", f"{other.text} → {other.answer}", 1.0)
    if copies:
        ctx.progress.log(f"merged {len(copies)} copies of training prompts")
    if removed.counts["conflict"]:
        first = removed.shown["conflict"][0]
        ctx.progress.log(
            f"{removed.counts['conflict']} copies had another answer; the most frequent was kept ({first[1]!r})"
        )
    return kept


def _limited(train: list[Example], most: int | None, removed: Removed) -> list[Example]:
    if most is None or len(train) <= most:
        return train
    ranking = ranked(train, compared_texts(train), "limit")
    for index in ranking[most:]:
        removed.add("limit", "", train[index].text, 0.0)
    return [train[index] for index in ranking[:most]]


def _labels(task: Task, splits: dict[Split, list[Example]], data: Data, ctx: Context) -> tuple[list[str], list[str]]:
    if task.type != "classification":
        return [], []
    labels, absent = check_labels(task, splits, data.path)
    if absent:
        listing = ", ".join(absent[:10]) + (", …" if len(absent) > 10 else "")
        if ctx.strict:
            hint = "correct task.labels, or add examples"
            raise DataError(f"task.labels has labels without training examples: {listing}", hint, file=data.path)
        ctx.progress.log(f"labels without training examples: {listing}")
    return labels, absent


def _partition(
    train: Sequence[Example], data: Data, task: Task, needs_teacher: bool, ctx: Context
) -> dict[str, list[Example]]:
    """Who learns from which training example.

    A teacher trained here gets its share of each label; the rest is the pool, whose labels nobody sees. The student's
    gold examples come from the teacher's share. Without such a teacher the pool is all that is not gold.
    """
    answered = [e for e in train if e.answer is not None]
    unanswered = [e for e in train if e.answer is None]
    if needs_teacher and not answered:
        hint = "give rows with answers, or a teacher that exists (teacher.base, teacher.endpoint)"
        raise DataError("no training row has an answer, so no teacher can be trained", hint, file=data.path)
    texts = compared_texts(answered)
    strata = [e.answer or "" if task.type == "classification" else "" for e in answered]
    share = data.teacher_share if needs_teacher else 1.0
    taught = take_share(ranked(answered, texts, "teacher"), strata, share)
    if len(taught) < len(answered):  # copies that differ in case or punctuation stay with the teacher
        forms = [normalise(text) for text in texts]
        known = {forms[index] for index in taught}
        taught = {index for index, form in enumerate(forms) if form in known}
    ranking = [index for index in ranked(answered, texts, "gold") if index in taught]
    if data.gold.per_label is not None:
        gold = take_per_stratum(ranking, strata, data.gold.per_label)
        short = sorted(label for label, n in Counter(strata[i] for i in gold).items() if n < data.gold.per_label)
        if short:
            shown = ", ".join(short[:10])
            ctx.progress.log(f"{len(short)} labels have fewer than {data.gold.per_label} gold examples: {shown}")
    elif data.gold.total is not None:
        gold = set(ranking[: data.gold.total])
    else:
        gold = set(ranking)
    pooled = set(range(len(answered))) - (taught if needs_teacher else gold)
    asked = {answered[i].id: answered[i].unanswered() for i in sorted(pooled)}  # a prompt may have several pairs
    if needs_teacher and len(gold) < len(taught) and not pooled and not unanswered:
        ctx.progress.log("the pool is empty: with data.teacher_share 1 the teacher learns from every training example")
    return {
        "teacher": _in_order([answered[i] for i in taught]) if needs_teacher else [],
        "gold": _in_order([answered[i] for i in gold]),
        "pool": _in_order([*asked.values(), *unanswered]),
        "oracle": _in_order([answered[i] for i in gold | pooled]),
    }


def _write(path: Path, examples: Sequence[Example], task: Task) -> dict[str, Any]:
    lines = [json.dumps(e.to_json(), ensure_ascii=False) for e in examples]
    content = "".join(line + "\n" for line in lines).encode("utf-8")
    path.write_bytes(content)
    counts = Counter(e.answer for e in examples if e.answer is not None) if task.type == "classification" else Counter()
    pairs = sum(e.rejected is not None for e in examples)
    return {
        "examples": len(examples),
        **({"pairs": pairs} if pairs else {}),
        "labels": dict(sorted(counts.items())),
        "longest_prompt_characters": max((sum(len(m.content) for m in e.prompt) for e in examples), default=0),
        "digest": digest_bytes(content),
    }
