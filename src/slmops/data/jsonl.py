"""Rows on disk: one JSON value per line, the form in which data steps hand examples on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slmops.core.example import Example
from slmops.errors import DataError


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file; none if there is no such file.

    Raises:
        DataError: a line is not a JSON object; its number is given.
    """
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"not JSON ({error})", "it was changed after it was made", file=str(path), line=number
                ) from error
            if not isinstance(value, dict):
                raise DataError("not a JSON object", "it was changed after it was made", file=str(path), line=number)
            rows.append(value)
    return rows


def read_examples(path: Path) -> list[Example]:
    """All examples of a file; none if there is no such file."""
    return [Example.from_json(row) for row in read_rows(path)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, keys in their order. Lone surrogates are escaped."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(_text(row) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, keys in their order."""
    path.write_text(_text(value, indent=1) + "\n", encoding="utf-8")


def _text(value: Any, indent: int | None = None) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(value, indent=indent)
    return text


def labels_of(info: Mapping[str, Any]) -> list[str]:
    """The labels that info.json of a data set names: a list, or the keys of a table of counts."""
    labels = info.get("labels") or []
    return [str(label) for label in labels]
