"""Reads the training and evaluation data that users have: files, folders, hub datasets, in the usual formats.

`read(data, source)` gives the examples of each split, each with the file and line it came from. All bad rows (up to 20)
are reported at once. Nothing is removed, split by share or judged here beyond what makes a row unreadable: that is
`slmops.data.prepare`.

Where the splits come from, in this order:

- `data.splits` names parts: keys of a JSON file, splits of a Hugging Face dataset, or files in the folder `data.path`
  (or beside the file `data.path`), with or without their suffix;
- `data.splits` is not set and parts have usual names (train, validation, valid, val, dev, test): these;
- else everything is `train`, and `data.prepare` shares it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

from slmops.core.example import Example
from slmops.core.spec import Columns, Data
from slmops.data.readers import hub
from slmops.data.readers.parts import SPLITS, SUFFIXES, USUAL, Container, Split, choose, named, resolve, stem
from slmops.data.readers.problems import Problems, did_you_mean
from slmops.data.readers.rows import SHAPES, RowError, Shape, detect, guess_columns, parser
from slmops.data.readers.text import Raw, read_delimited, read_json, read_jsonl, read_text
from slmops.errors import DataError

__all__ = ["SPLITS", "Problems", "Reading", "Record", "Split", "is_hub", "read", "source_files"]


@dataclass(frozen=True)
class Record:
    """An example and where it stands: `line` is 1-based, None where the format has no lines."""

    example: Example
    file: str
    line: int | None


@dataclass(frozen=True)
class Reading:
    """What was read.

    Attributes:
        splits: records by split; a split that the data does not name is not there.
        parts: which parts each split was made of, for people.
        columns: the columns taken, where they were guessed.
    """

    splits: dict[Split, list[Record]]
    parts: dict[Split, tuple[str, ...]]
    columns: dict[str, str] = field(default_factory=dict)


def is_hub(path: str) -> bool:
    """Whether `data.path` is a hub id."""
    return path.startswith("hf:")


def read(data: Data, source: Path | None = None) -> Reading:
    """Read the splits of a dataset.

    Args:
        data: the project file's `data`.
        source: the file or folder; None: `data.path` itself, for hub ids and for use as a library.

    Raises:
        DataError: a file is missing, empty, not UTF-8 or not in its format; a split or column name is unknown; rows are
            bad (all of them, up to 20); validation or test rows have no answer.
        MissingExtraError: the format needs the extra `hub`.
    """
    problems = Problems()
    available = _available(data, source, problems)
    chosen = choose(data, available)
    notes: dict[str, str] = {}
    splits: dict[Split, list[Record]] = {}
    for split, names in chosen.items():
        splits[split] = []
        for name in names:
            raws = available[name]()
            splits[split] += _records(raws, name, data, problems, notes, needs_answer=split != "train")
    problems.check()
    for split, records in splits.items():
        if not records:
            raise DataError(f"no rows for {split}", "the file has a header or brackets but no rows", file=data.path)
    return Reading(splits, chosen, notes)


def source_files(data: Data, source: Path | None = None) -> tuple[Path, ...]:
    """Every file that `read` would open, sorted: what a step's key has to cover. None for a hub id.

    Raises:
        DataError: `data.path` does not exist, or `data.splits` names a file that is not there.
    """
    if is_hub(data.path):
        return ()
    path = _existing(data, source)
    if path.is_dir():
        if hub.is_saved(path):
            return tuple(sorted(file for file in path.rglob("*") if file.is_file()))
        files = _folder_files(path, data)
        wanted = named(data)
        if not wanted:
            return tuple(files[name] for name in sorted(files))
        return tuple(sorted({files[part] for name in wanted for part in resolve(name, files, data.path)}))
    siblings = _siblings(path, data)
    return tuple(sorted({path, *(siblings[name] for name in named(data) if name in siblings)}))


Loader = Callable[[], list[Raw]]


def _existing(data: Data, source: Path | None) -> Path:
    path = source if source is not None else Path(data.path)
    if not path.exists():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, sorted(near)) if near else "the folder above it does not exist either"
        raise DataError("no such file or folder", f"check data.path; {hint}", file=data.path)
    return path


def _folder_files(folder: Path, data: Data) -> dict[str, Path]:
    """The data files of a folder (or, if it has none, of its folder `data`) by file name."""
    container = data.format if data.format in get_args(Container) else None
    for place in (folder, folder / "data"):
        if not place.is_dir():
            continue
        files = {
            file.name: file
            for file in sorted(place.iterdir())
            if file.is_file()
            and SUFFIXES.get(file.suffix.lower()) in ({container} if container else set(SUFFIXES.values()))
        }
        if files:
            return files
    known = ", ".join(SUFFIXES)
    raise DataError("no data file in this folder", f"files that are read end in {known}", file=data.path)


def _siblings(path: Path, data: Data) -> dict[str, Path]:
    """Files beside `path` that `data.splits` names."""
    files = ((name, path.parent / name) for name in named(data) if Path(name).suffix and Path(name).name == name)
    return {name: file for name, file in files if file.is_file()}


def _available(data: Data, source: Path | None, problems: Problems) -> dict[str, Loader]:
    """The parts of the data by name; each is parsed when it is asked for."""
    if is_hub(data.path):
        if data.format not in ("auto", "huggingface", *SHAPES):
            raise DataError(f"format {data.format!r} does not fit a hub id", "use format: huggingface", file=data.path)
        return _ready(hub.read_hub(data.path))
    path = _existing(data, source)
    if path.is_dir():
        if hub.is_saved(path):
            return _ready(hub.read_saved(path, data.path))
        files = _folder_files(path, data)
        shown = data.path.rstrip("/")
        return {name: _loader(file, f"{shown}/{name}", data, problems) for name, file in files.items()}
    container = _container(path, data)
    siblings = _siblings(path, data)
    beside = {
        name: _loader(file, str(Path(data.path).parent / name), data, problems) for name, file in siblings.items()
    }
    if container == "json":
        text = read_text(path, data.path)
        if data.format != "json" and _is_lines(text):
            return {"": lambda: list(read_jsonl(text, data.path, problems)), **beside}
        return {**beside, **_ready(read_json(text, data.path, problems))}
    return {"": _loader(path, data.path, data, problems), **beside}


def _ready(parts: dict[str, list[Raw]]) -> dict[str, Loader]:
    if len(parts) == 1 and not any(name in names for name in parts for names in USUAL.values()):
        parts = {"": next(iter(parts.values())), **parts}
    return {name: (lambda rows=rows: rows) for name, rows in parts.items()}  # type: ignore[misc]


def _container(path: Path, data: Data) -> Container:
    by_suffix = SUFFIXES.get(path.suffix.lower()) or SUFFIXES.get(Path(data.path).suffix.lower())
    for container in get_args(Container):
        if data.format == container:
            return container  # type: ignore[no-any-return]
    if data.format == "huggingface":
        if by_suffix != "parquet":
            raise DataError(
                "not a Hugging Face dataset", "give a Parquet file, a folder or hf:ORG/NAME", file=data.path
            )
        return "parquet"
    if by_suffix is None:
        if data.format in SHAPES:
            return "jsonl"
        known = ", ".join(SUFFIXES)
        raise DataError(
            f"cannot tell the format of a {path.suffix or 'nameless'} file",
            f"set data.format; known suffixes: {known}",
            file=data.path,
        )
    return by_suffix


def _loader(path: Path, name: str, data: Data, problems: Problems) -> Loader:
    def load() -> list[Raw]:
        container = _container(path, data)
        if container == "parquet":
            return hub.read_parquet(path, name)
        text = read_text(path, name)
        if container == "jsonl" or (container == "json" and data.format != "json" and _is_lines(text)):
            return list(read_jsonl(text, name, problems))
        if container == "json":
            return [row for rows in read_json(text, name, problems).values() for row in rows]
        by_position = all(isinstance(c, int) for c in _mapped(data.columns).values()) and bool(_mapped(data.columns))
        return list(read_delimited(text, name, problems, tabs=container == "tsv", header=not by_position))

    return load


def _is_lines(text: str) -> bool:
    """Whether a .json file is JSON Lines: its first two lines that are not blank are objects each."""
    lines = [line for line in text[: 1 << 20].split("\n") if line.strip()][:2]
    return len(lines) == 2 and all(line.strip()[0] == "{" and line.strip()[-1] == "}" for line in lines)


def _mapped(columns: Columns) -> dict[str, str | int]:
    return {key: value for key, value in columns.model_dump().items() if value is not None}


def _records(
    raws: Sequence[Raw], part: str, data: Data, problems: Problems, notes: dict[str, str], *, needs_answer: bool
) -> list[Record]:
    if not raws:
        return []
    first = raws[0]
    columns = data.columns
    shape: Shape
    if data.format in SHAPES and not (data.format == "preference" and _mapped(columns)):
        shape = data.format
    else:
        shape = "columns" if _mapped(columns) else detect(first.value)
    if shape == "columns":
        columns = _checked_columns(raws, columns, notes)
        if data.format == "preference" and columns.rejected is None:
            hint = "say where the rejected answer stands: data.columns: {prompt: …, answer: …, rejected: …}"
            raise DataError("data.columns names no rejected answer", hint, file=first.file, line=first.line)
    parse = parser(shape, columns)
    out = []
    for raw in raws:
        try:
            example = parse(raw.value)
        except RowError as error:
            problems.add(error.message, error.hint, file=raw.file, line=raw.line)
            continue
        if needs_answer and example.answer is None:
            hint = "validation and test rows need one; the last message must be from the assistant"
            problems.add("the row has no answer", hint, file=raw.file, line=raw.line)
            continue
        name = Path(raw.file).name.split(" row ")[0]
        source = f"{name}:{part}" if part and stem(part) not in stem(name) else name
        out.append(Record(replace(example, source=source), raw.file, raw.line))
    return out


def _checked_columns(raws: Sequence[Raw], columns: Columns, notes: dict[str, str]) -> Columns:
    """The mapping, guessed if none is given; every name in it is a key of some row."""
    first = raws[0]
    where = {"file": first.file, "line": first.line}
    keys: dict[str, None] = {}
    for raw in raws:
        if isinstance(raw.value, dict):
            keys.update(dict.fromkeys(raw.value))
    if not _mapped(columns):
        try:
            columns = guess_columns(first.value)
        except RowError as error:
            raise DataError(error.message, error.hint, file=first.file, line=first.line) from error
        notes.update({key: str(value) for key, value in _mapped(columns).items()})
    if columns.prompt is None:
        raise DataError("data.columns has no prompt", "add: prompt: NAME", **where)  # type: ignore[arg-type]
    if columns.rejected is not None and columns.answer is None:
        hint = "add the chosen one: answer: NAME"
        raise DataError("data.columns has a rejected answer alone", hint, **where)  # type: ignore[arg-type]
    missing = [(what, name) for what, name in _mapped(columns).items() if isinstance(name, str) and name not in keys]
    if missing and keys:
        what, name = missing[0]
        hint = did_you_mean(name, keys)
        if len(keys) == 1 and any(mark in next(iter(keys)) for mark in ";\t|"):
            hint = "the cells seem to be separated by something else than a comma: convert the file, or use format: tsv"
        raise DataError(f"no column {name!r} (data.columns.{what})", hint, file=first.file, line=first.line)
    if missing:
        raise DataError(
            f"column {missing[0][1]!r} is a name, but the rows are lists", "give positions: prompt: 0, answer: 1",
            file=first.file, line=first.line,
        )  # fmt: skip
    return columns
