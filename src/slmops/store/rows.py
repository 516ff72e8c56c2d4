"""Rows on disk: one JSON object per line, the form in which steps hand examples on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slmops.core.example import Example
from slmops.errors import DataError


def numbered(path: Path, name: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file with their line numbers, counted from 1; empty lines are passed over.

    Args:
        name: what error messages call the file; default: its path.

    Raises:
        DataError: a line is not a JSON object; its number is given.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise _changed(f"not JSON ({error})", name or str(path), number) from error
            if not isinstance(value, dict):
                raise _changed("not a JSON object", name or str(path), number)
            yield number, value


def numbered_examples(path: Path, name: str = "") -> Iterator[tuple[int, Example]]:
    """The examples of a file with their line numbers; see `numbered`.

    Raises:
        DataError: besides, a row is no canonical example.
    """
    for number, row in numbered(path, name):
        try:
            example = Example.from_json(row)
        except (KeyError, TypeError, IndexError) as error:
            raise _changed(f"not a canonical example ({error!r})", name or str(path), number) from error
        yield number, example


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file; none if there is no such file. Raises as `numbered` does."""
    return [row for _number, row in numbered(path)] if path.exists() else []


def read_examples(path: Path) -> list[Example]:
    """All examples of a file; none if there is no such file. Raises as `numbered_examples` does."""
    return [example for _number, example in numbered_examples(path)] if path.exists() else []


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


def _changed(what: str, file: str, line: int) -> DataError:
    return DataError(what, "the file was changed after it was made", file=file, line=line)
