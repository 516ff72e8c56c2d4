"""From the user's files to fixed splits that cannot leak: the first step of every run.

Promises: the same rows give the same bytes, in whatever order they stand; a prompt's split depends on its text alone;
no training, teacher or pool example is an exact or near copy of a validation or test one; what was removed is counted
and shown in `info.json`. Evaluation data is never thinned for the sake of training data.

Writes `teacher`, `gold`, `pool`, `oracle`, `validation` and `test` (`.jsonl`, one example a line) and `info.json`:

- `files`: by name: examples, pairs (where some have a rejected answer), labels (count by label),
  longest_prompt_characters, digest;
- `labels`, `labels_without_examples`, `columns` (where they were guessed), `parts` (what each split was made of);
- `removed`: by kind, `{count, examples: [[kept text, removed text, similarity], … up to 20]}`. The kinds are
  `{train,validation}_{exact,near,ngram}` for copies of evaluation data, `duplicate` for further copies of a training
  prompt, `conflict` for those copies with another answer, `limit` for what `max_examples` left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as MethodParams
from slmops.core.spec import Data, Task

DECLARATION = Declaration(
    name="data.prepare",
    version="2",
    makes="dataset",
    takes={"source?": "source"},
    extra="data",
    packages=("datasketch",),
)


class Params(MethodParams):
    """What to prepare.

    Attributes:
        needs_teacher: this file trains a teacher, which gets its share of the gold examples.
        needs_pairs: every answered training row must have a rejected answer too.
    """

    data: Data
    task: Task
    needs_teacher: bool = True
    needs_pairs: bool = False


def covers(params: Params, source: Path) -> tuple[Path, ...]:
    """The files that `run` would read: what the step's key has to cover, files beside `source` included.

    Raises:
        DataError: a folder without data, or without a file that the splits name.
    """
    from slmops.data.readers import source_files

    return source_files(params.data, source)


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Read, split, clean and partition.

    Args:
        inputs: `source`, the file or folder that holds the data; absent for a hub id.

    Raises:
        DataError: the data cannot be used; the message says where and why.
        LeakError: training data repeats evaluation data, and the run is strict.
        MissingExtraError: the format or the size of the data needs an extra.
    """
    from slmops.data.preparation import prepare

    return prepare(
        params.data, params.task, inputs.get("source"), out, ctx, needs_teacher=params.needs_teacher,
        needs_pairs=params.needs_pairs,
    )  # fmt: skip
