"""Examples to token ids: once, before training, with every refusal that the data can cause.

It promises that training sees exactly what an engine will feed the model: the prompt rendered by the chat template with
the generation prompt, encoded alone; then the answer and the end token.

An example that is too long is an error, but for augmented copies (`data.augment`): nobody wrote those, so they are left out
and counted. A teacher's pass tells the student's training which ones it left out (`left_out_before`): both see the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.digest import digest_file, digest_json, digest_text
from slmops.core.example import Example
from slmops.core.method import Context
from slmops.engines.tokenizer import load_tokenizer as load_tokenizer
from slmops.engines.tokenizer import rendered
from slmops.errors import DataError
from slmops.store.rows import numbered_examples

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """An example and where it stands, for error messages."""

    example: Example
    file: str
    line: int


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples.

    Attributes:
        ids: for each example its int64 token ids: prompt, answer, end token.
        answer_from: (examples,) index of the first answer token; at least 1.
        rows: the examples themselves, in the same order.
        left_out: augmented copies that are too long, which are not among them.
    """

    ids: tuple[Ints, ...]
    answer_from: Ints
    rows: tuple[Row, ...]
    left_out: tuple[Row, ...] = ()

    @property
    def lengths(self) -> Ints:
        """(examples,) tokens of each."""
        import numpy as np

        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    @property
    def answer_tokens(self) -> Ints:
        """(examples,) answer tokens of each, the end token included."""
        return self.lengths - self.answer_from

    def take(self, chosen: Sequence[int]) -> Encoded:
        """The chosen examples, in the given order."""
        import numpy as np

        where = np.array(chosen, dtype=np.int64)
        return Encoded(tuple(self.ids[i] for i in chosen), self.answer_from[where], tuple(self.rows[i] for i in chosen))

    def digest(self) -> str:
        """Digest of all ids and answer starts: what a checkpoint must agree with."""
        import hashlib

        sha = hashlib.sha256()
        sha.update(self.lengths.tobytes())
        sha.update(self.answer_from.tobytes())
        for ids in self.ids:
            sha.update(ids.tobytes())
        return "sha256:" + sha.hexdigest()


def read(inputs: Mapping[str, Path], files: Sequence[str]) -> list[Row]:
    """The rows of files named `input/file`.

    Raises:
        DataError: an input or file is missing.
    """
    rows: list[Row] = []
    for entry in files:
        name, _, file = entry.partition("/")
        if name not in inputs:
            raise DataError(f"{entry}: there is no input called {name!r}", f"inputs are: {', '.join(sorted(inputs))}")
        path = inputs[name] / file
        if not path.is_file():
            raise DataError(
                f"{entry}: no such file", f"{name} holds: {', '.join(sorted(p.name for p in inputs[name].iterdir()))}"
            )
        rows += [Row(example, entry, number) for number, example in numbered_examples(path, entry)]
    return rows


def tokenizer_digest(folder: Path) -> str:
    """Digest of what decides token ids: tokenizer.json and the chat template."""
    config = folder / "tokenizer_config.json"
    template = json.loads(config.read_text("utf-8")).get("chat_template") if config.exists() else None
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    names = [n for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt") if (folder / n).exists()]
    return digest_json({"template": template, "files": {n: digest_file(folder / n) for n in names}})


def answer_digest(row: Row) -> str:
    """16 hex digits that name an answered example: the prompt's id and the answer's text."""
    return digest_text(f"{row.example.id}\n{row.example.answer}")[7:23]


def left_out_before(inputs: Mapping[str, Path]) -> frozenset[str]:
    """The `answer_digest` of each copy that the teacher's pass among the inputs of a training left out."""
    found: set[str] = set()
    for name in ("logits", "aligned"):
        file = inputs[name] / "index.json" if name in inputs else None
        if file is not None and file.is_file():
            found |= set(json.loads(file.read_text("utf-8")).get("left_out", ()))
    return frozenset(found)


def say_left_out(count: int, ctx: Context) -> None:
    """Tell how many augmented copies are too long, if there are some."""
    if count:
        ctx.progress.log(f"{count} augmented copies are longer than the context (or train.max_length): left out")


def encode(rows: Sequence[Row], tokenizer: Any, limit: int, copies: int | None = None) -> Encoded:
    """Token ids of answered examples, without augmented copies that are too long.

    Args:
        limit: most tokens an example may have: the model's context or `max_length`.
        copies: most tokens of an augmented copy, where that is less.

    Raises:
        DataError: an example has no answer, holds a control mark such as `<|end|>`, or is longer than `limit` and no copy.
    """
    import numpy as np

    marks = [t for t in tokenizer.all_special_tokens + list(tokenizer.get_added_vocab()) if len(t) >= 4]
    prompts, answers = [], []
    for row in rows:
        if row.example.answer is None:
            raise DataError(
                "the example has no answer", "only answered examples can be trained on", file=row.file, line=row.line
            )
        for text in (*(m.content for m in row.example.prompt), row.example.answer):
            mark = next((m for m in marks if m in text), None) if "<" in text or "[" in text else None
            if mark is not None:
                raise DataError(
                    f"the text holds the control mark {mark}",
                    "remove it: it would end the turn",
                    file=row.file,
                    line=row.line,
                )
        prompt, answer = rendered(tokenizer, row.example)
        prompts.append(prompt)
        answers.append(answer)
    if not rows:
        return Encoded((), np.zeros(0, np.int64), ())
    heads = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    tails = tokenizer(answers, add_special_tokens=False)["input_ids"]
    most = min(limit, limit if copies is None else copies)
    stay = [i for i, row in enumerate(rows) if not row.example.parent or len(heads[i]) + len(tails[i]) <= most]
    left_out = tuple(rows[i] for i in sorted(set(range(len(rows))) - set(stay)))
    rows, heads, tails = [rows[i] for i in stay], [heads[i] for i in stay], [tails[i] for i in stay]
    long = [i for i in range(len(rows)) if len(heads[i]) + len(tails[i]) > limit]
    if long:
        row, size, total = rows[long[0]], len(heads[long[0]]), len(heads[long[0]]) + len(tails[long[0]])
        what, count = ("the prompt is", size) if size >= limit else ("prompt and answer are", total)
        more = f" ({len(long) - 1} more examples are too long)" if len(long) > 1 else ""
        raise DataError(
            f"{what} longer than the model's context: {count} tokens, {limit} fit{more}: {row.example.text[:60]!r}",
            "raise the model's context (or train.max_length), or shorten or remove the examples",
            file=row.file,
            line=row.line,
        )
    ids = tuple(np.array(h + t, dtype=np.int64) for h, t in zip(heads, tails, strict=True))
    return Encoded(ids, np.array([len(h) for h in heads], dtype=np.int64), tuple(rows), left_out)
