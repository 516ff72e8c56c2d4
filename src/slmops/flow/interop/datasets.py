"""Where a trainer's models and datasets are, in the terms of slmops: a path beside slmops.yaml, or hf:ORG/NAME.

Other trainers mix many datasets; slmops has one `data.path`, so several are one path where they lie in one folder (or
in one hub dataset), and the others are dropped by name. Looks at which files exist; reads none, but to count rows.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slmops.flow.interop.rules import Drop, Outcome, Set, Source

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
COUNTED_BYTES = 200_000_000
LAST_TURN = "slmops learns the last answer of a conversation, {} every answer in it"


@dataclass(frozen=True)
class Dataset:
    """One dataset of the file.

    Attributes:
        name: for messages.
        place: a path as the file writes it, or an `hf:` address.
        local: where it is on this machine, if it is here.
        part: a split of a hub dataset, or "".
        format: `data.format`.
        columns: `data.columns`.
        at: the key inside the datasets' key.
        notes: in which way the meaning differs.
        drops: what of it has no counterpart.
    """

    name: str
    place: str
    local: Path | None = None
    part: str = ""
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    at: str = ""
    notes: tuple[str, ...] = ()
    drops: tuple[Drop, ...] = ()


def find(path: str, source: Source, *more: Path) -> Path | None:
    """A file or folder as the trainer would find it: from where it is started, then beside its file."""
    try:
        wanted = Path(path).expanduser()
    except RuntimeError:  # a `~name` of nobody
        wanted = Path(path)
    for base in (*more, Path.cwd(), source.file.resolve().parent):
        if (base / wanted).exists():
            return (base / wanted).resolve()
    return None


def written(path: Path, source: Source) -> str:
    """A path as slmops.yaml writes it, relative to its folder."""
    return Path(os.path.relpath(path, source.out.resolve())).as_posix()


def hub(name: str, config: str = "", revision: str = "") -> str:
    """`hf:NAME[:CONFIG][@REVISION]`."""
    return f"hf:{name}{f':{config}' if config else ''}{f'@{revision}' if revision and revision != 'main' else ''}"


def model(name: str, revision: str, source: Source, path: str = "student.base") -> list[Outcome]:
    """An existing model: a folder that is here, a hub id, or a path that is kept as it is."""
    local = find(name, source)
    if local is not None:
        return [Set(path, written(local, source))]
    if HUB.fullmatch(name):
        return [Set(path, hub(name, revision=revision))]
    return [Set(path, name, "no such folder from here: correct the path")]


def place(name: str, source: Source, config: str = "", revision: str = "", *more: Path) -> tuple[str, Path | None]:
    """A dataset's place, and where it is if it is here."""
    local = find(name, source, *more)
    if local is None and HUB.fullmatch(name) and not name.endswith(SUFFIXES):
        return hub(name, config, revision), None
    return (name if local is None else written(local, source)), local


def split_name(split: str) -> tuple[str, tuple[Drop, ...]]:
    """The split of a hub dataset without its slice: `train[:10%]` is `train`."""
    name, bracket, _ = split.partition("[")
    if not bracket:
        return name, ()
    return name, (Drop(f"the slice of {split}: slmops takes whole splits; see data.max_examples", changes=True),)


def combine(train: Sequence[Dataset], validation: Sequence[Dataset], at_validation: bool = False) -> list[Outcome]:
    """The settings of `data` for all datasets of a file, and what is left out.

    Args:
        train: datasets to learn from, at least one.
        validation: datasets for validation only.
        at_validation: answer for the key that names those for validation, else for the one that names training data.
    """
    first = train[0]
    folder = first.local.parent if first.local is not None else None
    fits = [d for d in train if _beside(d, first, folder)]
    formats = {d.format for d in fits}
    same = [d for d in fits if d.columns == first.columns]
    held = [d for d in validation if _beside(d, first, folder)]
    if at_validation:
        wrong = [d for d in validation if d not in held]
        out: list[Outcome] = [Set("data.splits.validation", [_part(d) for d in held])] if held else []
        reason = "{}: validation data must lie beside the training data, or in the same hub dataset"
        return [*out, *(Drop(reason.format(d.name), True, d.at) for d in wrong), *(x for d in held for x in d.drops)]
    several = len(same) > 1 and folder is not None
    path = (Path(first.place).parent.as_posix() or ".") if several else first.place
    notes = [*dict.fromkeys(note for d in same for note in d.notes)]
    missing = first.local is None and not first.place.startswith("hf:")
    if missing and not notes:
        notes = ["no such file from here: correct the path"]
    out = [
        Set("data.path", path, "; ".join(notes), first.at),
        Set("data.format", first.format if len(formats) == 1 else "auto", at=first.at),
    ]
    if first.columns:
        out += [Set(f"data.columns.{key}", name, at=first.at) for key, name in first.columns.items()]
    parts = [_part(d) for d in same if _part(d)]
    if several or (first.part and (first.part != "train" or len(parts) > 1)):
        out.append(Set("data.splits.train", parts, at=first.at))
    for dataset in train:
        out += dataset.drops
        if dataset not in fits:
            why = "there is one data.path: join the files in one folder and name them in data.splits.train"
            out.append(Drop(f"{dataset.name}: {why}", True, dataset.at))
        elif dataset not in same:
            out.append(Drop(f"{dataset.name}: its columns differ from those of {first.name}", True, dataset.at))
    return out


def _beside(dataset: Dataset, first: Dataset, folder: Path | None) -> bool:
    if dataset is first:
        return True
    if folder is not None:
        return dataset.local is not None and dataset.local.parent == folder and dataset.local.is_file()
    return first.place.startswith("hf:") and dataset.place == first.place and bool(dataset.part) and bool(first.part)


def _part(dataset: Dataset) -> str:
    return dataset.local.name if dataset.local is not None else dataset.part


def count(datasets: Sequence[Dataset], most: int = 0) -> int | None:
    """Rows of JSON and JSON Lines files that are here; None if one is not, or is too large to look through.

    Args:
        datasets: all that the trainer mixes.
        most: rows taken of each; 0: all.
    """
    total = 0
    for dataset in datasets:
        file = dataset.local
        if file is None or not file.is_file() or file.stat().st_size > COUNTED_BYTES:
            return None
        try:
            text = file.read_text(encoding="utf-8-sig")
            rows = _rows(text, file.suffix.lower())
        except (OSError, ValueError):
            return None
        if rows is None:
            return None
        total += min(rows, most) if most else rows
    return total or None


def _rows(text: str, suffix: str) -> int | None:
    if suffix in (".jsonl", ".ndjson") or (suffix == ".json" and text.lstrip()[:1] == "{"):
        return sum(1 for line in text.split("\n") if line.strip())
    if suffix != ".json":
        return None
    value = json.loads(text)
    return len(value) if isinstance(value, list) else None
