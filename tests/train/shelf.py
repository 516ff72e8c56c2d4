"""Every training method with what it needs, on tiny models: teachers that know the task, students that do not."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from slmops.core.example import Example
from slmops.core.method import Context, SilentProgress
from slmops.core.spec import Task, Train, Training
from slmops.train import (
    cache_aligned,
    cache_logits,
    cross_tokenizer,
    dpo,
    hidden_states,
    logits,
    on_policy,
    orpo,
    sft,
)
from slmops.train import tokenizer as tokenizers
from tests.train import bases
from tests.train.conftest import LABELS, examples, write_rows

MODULES: Mapping[str, Any] = {
    "sft": sft, "sequence": sft, "logits": logits, "several_teachers": logits, "on_policy": on_policy,
    "hidden_states": hidden_states, "cross_tokenizer": cross_tokenizer, "dpo": dpo, "orpo": orpo,
}  # fmt: skip
"""What learns, by the name of a way to learn: `sequence` and `several_teachers` differ in their inputs alone."""

METHODS = tuple(MODULES)
PREFERENCE = ("dpo", "orpo")
TUNINGS = ("full", "lora", "rslora", "dora", "qlora", "adapter")
FAST: Mapping[str, Any] = {
    "epochs": 3, "batch_size": 16, "learning_rate": 1e-2, "evaluations": 3, "lora": {"rank": 4}, "adapter_width": 32,
    "on_policy": {"max_new_tokens": 8}, "preference": {"beta": 0.3},
}  # fmt: skip
TEACHER = Training(epochs=8, batch_size=16, learning_rate=1e-2, evaluations=2)
FILES = ("data/teacher.jsonl",)


class Stop(BaseException):
    """Ends a training as a kill would: nothing handles it."""


class Stopping(SilentProgress):
    """Stops after some training steps (whose advances carry a note)."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def advance(self, done: int = 1, note: str = "") -> None:
        self.left -= done if note else 0
        if self.left <= 0:
            raise Stop


def ranked(count: int, seed: int = 0) -> list[Example]:
    """Messages with their label as the chosen answer and a longer text about another label as the rejected one."""
    rng = random.Random(seed)
    return [
        replace(e, rejected=f"{rng.choice([label for label in sorted(LABELS) if label != e.answer])} i guess")
        for e in examples(count, seed)
    ]


def context(scratch: Path, progress: SilentProgress | None = None) -> Context:
    """One thread, seed 3."""
    return Context(3, scratch, scratch, 1, progress or SilentProgress())


@dataclass(frozen=True)
class Shelf:
    """Folders that are made when they are asked for, once: the data, and per architecture the models and caches.

    Attributes:
        folder: where.
        data: as the fixture of that name makes it.
        tokenizer: of teachers and students.
    """

    folder: Path
    data: Path
    tokenizer: Path

    def __hash__(self) -> int:
        return hash(self.folder)

    def _new(self, name: str) -> Path:
        out = self.folder / name
        out.mkdir(parents=True)
        return out

    @cache  # noqa: B019
    def pairs(self) -> Path:
        """A data set of preferences."""
        out = self._new("pairs")
        write_rows(out / "gold.jsonl", ranked(60))
        write_rows(out / "validation.jsonl", ranked(20, 3))
        return out

    @cache  # noqa: B019
    def student(self, kind: str) -> Path:
        """Random weights, the teachers' tokenizer."""
        return bases.save(kind, self.tokenizer, self.folder / f"{kind}-student", seed=2)

    @cache  # noqa: B019
    def foreign(self, kind: str) -> Path:
        """A student with a tokenizer of its own."""
        words = self._new(f"{kind}-words")
        tokenizers.run(tokenizers.Params(vocabulary=300), {"data": self.data}, words, context(words))
        return bases.save(kind, words, self.folder / f"{kind}-foreign", seed=2)

    @cache  # noqa: B019
    def teacher(self, kind: str) -> Path:
        """Wider and deeper than the students; it has learned the task."""
        start = bases.save(kind, self.tokenizer, self.folder / f"{kind}-start", hidden=96, layers=3, seed=1)
        out, params = self._new(f"{kind}-teacher"), sft.Params(training=TEACHER, files=FILES)
        sft.run(params, {"data": self.data, "base": start}, out, context(self._new(f"{kind}-scratch")))
        return out

    @cache  # noqa: B019
    def synthetic(self, kind: str) -> Path:
        """What the teacher answered, and what of it is sound."""
        from slmops.data import answer, filter

        task = Task(type="classification", labels=tuple(sorted(LABELS)))
        answers, out = self._new(f"{kind}-answers"), self._new(f"{kind}-synthetic")
        inputs = {"data": self.data, "teacher": self.teacher(kind)}
        answer.run(answer.Params(task=task, max_new_tokens=12), inputs, answers, context(answers))
        filter.run(filter.Params(task=task), {"data": self.data, "answers": answers}, out, context(out))
        return out

    @cache  # noqa: B019
    def distributions(self, kind: str, several: bool) -> Path:
        """The teacher's distributions, or the mean of two teachers' of different architecture."""
        out = self._new(f"{kind}-distributions{'-2' if several else ''}")
        other = bases.ARCHITECTURES[(bases.ARCHITECTURES.index(kind) + 1) % len(bases.ARCHITECTURES)]
        inputs = {"data": self.data, "teacher": self.teacher(kind)}
        inputs |= {"teacher.b": self.teacher(other)} if several else {}
        params = cache_logits.Params(files=FILES, weights={"b": 0.5} if several else {})
        cache_logits.run(params, inputs, out, context(out / "scratch"))
        return out

    @cache  # noqa: B019
    def aligned(self, kind: str) -> Path:
        """The teacher's pass, for the student with another tokenizer."""
        out = self._new(f"{kind}-aligned")
        inputs = {"data": self.data, "teacher": self.teacher(kind), "base": self.foreign(kind)}
        cache_aligned.run(cache_aligned.Params(files=FILES), inputs, out, context(out / "scratch"))
        return out

    def inputs(self, method: str, kind: str) -> dict[str, Path]:
        """What a method takes."""
        base = self.foreign(kind) if method == "cross_tokenizer" else self.student(kind)
        found = {"data": self.pairs() if method in PREFERENCE else self.data, "base": base}
        if method == "sequence":
            found["synthetic"] = self.synthetic(kind)
        elif method in ("logits", "several_teachers"):
            found["logits"] = self.distributions(kind, method == "several_teachers")
        elif method in ("on_policy", "hidden_states"):
            found["teacher"] = self.teacher(kind)
        elif method == "cross_tokenizer":
            found["aligned"] = self.aligned(kind)
        return found


def params(method: str, tuning: str = "full", **changes: Any) -> Any:
    """The parameters of a short training."""
    settings: dict[str, Any] = {**FAST, "tuning": tuning, **changes}
    files: tuple[str, ...] = FILES
    if method == "sequence":
        files = ("data/gold.jsonl", "synthetic/train.jsonl")
    elif method in PREFERENCE:
        files = ("data/gold.jsonl",)
    if MODULES[method] is sft:
        training: Any = Training.model_validate({k: v for k, v in settings.items() if k in Training.model_fields})
    else:
        training = Train.model_validate(settings | {"method": "logits" if method == "several_teachers" else method})
    return MODULES[method].Params(training=training, files=files, validation="data/validation.jsonl")


def run(method: str, tuning: str, inputs: Mapping[str, Path], out: Path, scratch: Path,
        progress: SilentProgress | None = None, **changes: Any) -> dict[str, Any]:  # fmt: skip
    """A training of one method and tuning."""
    out.mkdir(exist_ok=True)
    facts: dict[str, Any] = MODULES[method].run(
        params(method, tuning, **changes), inputs, out, context(scratch, progress)
    )
    return facts
