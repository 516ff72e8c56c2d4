"""Which part of the data (a file of a folder, a key of a JSON file, a split of a hub dataset) makes which split."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal, get_args

from slmops.core.spec import Data
from slmops.data.readers.problems import did_you_mean
from slmops.errors import DataError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

Container = Literal["csv", "tsv", "json", "jsonl", "parquet"]
SUFFIXES: dict[str, Container] = {
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".parquet": "parquet",
}  # fmt: skip
USUAL: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "validate", "val", "dev"),
    "test": ("test",),
}


def named(data: Data) -> list[str]:
    """All part names that `data.splits` gives."""
    splits = data.splits
    given = (splits.train, splits.validation, splits.test)
    return [name for names in given if isinstance(names, tuple) for name in names]


def stem(name: str) -> str:
    """`train` for `train.csv`, `train-00000-of-00002.parquet` and `train`."""
    stem = Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name
    return re.sub(r"-\d{5}-of-\d{5}$", "", stem)


def resolve(name: str, available: Iterable[str], where: str) -> list[str]:
    """The part that a name means, or its shards (`train` for `train-00000-of-00002.parquet`, …).

    Raises:
        DataError: none, or several that are not shards.
    """
    known = [part for part in available if part]
    if name in known:
        return [name]
    fits = sorted(part for part in known if stem(part) == name)
    if len(fits) == 1 or (fits and all("-of-" in part for part in fits)):
        return fits
    if fits:
        raise DataError(f"{name!r} could be {', '.join(fits)}", "give the whole file name in data.splits", file=where)
    raise DataError(f"data.splits names {name!r}, which is not there", did_you_mean(name, known), file=where)


def choose(data: Data, available: Collection[str]) -> dict[Split, tuple[str, ...]]:
    """Which parts make which split."""
    splits = data.splits
    given: dict[Split, tuple[str, ...]] = {}
    for split in SPLITS:
        names = getattr(splits, split)
        if isinstance(names, tuple):
            given[split] = names
    chosen: dict[Split, tuple[str, ...]] = {}
    for split, names in given.items():
        chosen[split] = tuple(part for name in names for part in resolve(name, available, data.path))
    owner: dict[str, Split] = {}
    for split, names in chosen.items():
        for part in names:
            if part in owner:
                hint = "each part belongs to one split"
                raise DataError(f"data.splits gives {part!r} twice ({owner[part]}, {split})", hint, file=data.path)
            owner[part] = split
    if "" in available:
        if "train" not in chosen:
            chosen["train"] = ("",)
        return {split: chosen[split] for split in SPLITS if split in chosen}
    usual: dict[Split, tuple[str, ...]] = {}
    for split in SPLITS:
        fits = (part for part in available if part not in owner and stem(part).casefold() in USUAL[split])
        usual[split] = tuple(sorted(fits))
    for split in SPLITS:
        unset = getattr(splits, split) is None
        if split not in chosen and unset and usual[split]:
            chosen[split] = usual[split]
            owner.update(dict.fromkeys(usual[split], split))
    if "train" not in chosen:
        rest = tuple(part for part in sorted(available) if part not in owner)
        if len(rest) != 1:
            there = ", ".join(sorted(available)) or "none"
            raise DataError(
                "cannot tell which part is for training", f"set data.splits.train; there are: {there}", file=data.path
            )
        chosen["train"] = rest
    return {split: chosen[split] for split in SPLITS if split in chosen}
