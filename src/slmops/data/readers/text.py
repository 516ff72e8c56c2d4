"""Text files to raw rows: JSON Lines, JSON, CSV and TSV, each row with the line it begins on.

Nothing is interpreted here beyond the file format: a row is a dict (by column name) or a list (by position). Files are
UTF-8 with or without a byte order mark. What is wrong with single rows goes to `Problems`; what makes a file
unreadable as a whole is raised at once.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.data.readers.problems import Problems
from slmops.errors import DataError

RawValue = dict[str, Any] | list[Any]
LONGEST_FIELD = 1 << 30


@dataclass(frozen=True)
class Raw:
    """One row as it stands in a file; `line` is 1-based (None where the format has no lines), `file` is for people."""

    value: RawValue
    file: str
    line: int | None


def read_text(path: Path, name: str) -> str:
    """A whole UTF-8 file without its byte order mark.

    Raises:
        DataError: missing, unreadable, empty, not UTF-8 (with byte and line), or with NUL bytes.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError("no such file", "check data.path and data.splits", file=name) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", "check the file's permissions", file=name) from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError("the file is UTF-16", "save it as UTF-8, for instance: iconv -f UTF-16 -t UTF-8", file=name)
    if (nul := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, nul) + 1
        raise DataError("a NUL byte: this is not text", "save the file as UTF-8 text", file=name, line=line)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # `utf-8-sig` counts from after the mark; decode again without it so that positions are those of the file.
        start = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise DataError(
            f"byte 0x{data[start]:02x} at position {start} is not UTF-8",
            "save the file as UTF-8; if it is Latin-1: iconv -f LATIN1 -t UTF-8",
            file=name,
            line=data.count(b"\n", 0, start) + 1,
        ) from error
    if not text.strip():
        raise DataError("the file is empty", "give a file with at least one row", file=name)
    return text


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused if it names a key twice."""
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=unique_pairs, parse_constant=_no_constant)


def parse_json(text: str) -> Any:
    """Strict JSON: no NaN, no key twice.

    Raises:
        ValueError: with a message for people.
    """
    try:
        return DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _bad_json(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"bad JSON at column {error.colno}: {error.msg}"
    return f"bad JSON: {error}"


def read_jsonl(text: str, name: str, problems: Problems) -> Iterator[Raw]:
    """Rows of JSON Lines. Blank lines are skipped."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            hint = "one JSON object per line; for a file that is one JSON list use format: json"
            problems.add(_bad_json(error), hint, file=name, line=number)
            continue
        if isinstance(value, dict | list):
            yield Raw(value, name, number)
        else:
            problems.add(
                f"the row is a {type(value).__name__}, not an object or a list",
                "one object a line",
                file=name,
                line=number,
            )


class _Cursor:
    """A place in a JSON text; moves forward only, and knows its line."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name
        self.at, self._counted, self._line = 0, 0, 1

    def line(self, at: int) -> int:
        self._line += self.text.count("\n", self._counted, at)
        self._counted = at
        return self._line

    def peek(self) -> str:
        text, at = self.text, self.at
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        self.at = at
        return text[at : at + 1]

    def take(self, wanted: str) -> str:
        char = self.peek()
        if not char or char not in wanted:
            raise self.error(
                f"expected {' or '.join(repr(c) for c in wanted)}, found {char!r}" if char else "it ends early"
            )
        self.at += 1
        return char

    def value(self) -> Any:
        self.peek()
        try:
            value, self.at = DECODER.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            self.at = error.pos
            raise self.error(error.msg) from error
        except (ValueError, RecursionError) as error:
            raise self.error(str(error)) from error
        return value

    def error(self, message: str) -> DataError:
        column = self.at - (self.text.rfind("\n", 0, self.at) + 1) + 1
        line = self.text.count("\n", 0, self.at) + 1
        hint = "correct the file; if every line is an object of its own use format: jsonl"
        return DataError(f"bad JSON at column {column}: {message}", hint, file=self.name, line=line)


def read_json(text: str, name: str, problems: Problems) -> dict[str, list[Raw]]:
    """Rows of a JSON file by split name; a file that is one list has the one name "".

    Raises:
        DataError: bad JSON, or neither a list of rows nor an object whose values are such lists.
    """
    cursor = _Cursor(text, name)
    parts: dict[str, list[Raw]] = {}
    first = cursor.peek()
    if first == "[":
        parts[""] = list(_json_rows(cursor, problems))
    elif first == "{":
        cursor.take("{")
        mark = cursor.take('"}') if cursor.peek() == "}" else ""
        while mark != "}":
            if cursor.peek() != '"':
                raise cursor.error("expected a key in double quotes")
            key = cursor.value()
            if key in parts:
                raise cursor.error(f"the key {key!r} stands twice")
            cursor.take(":")
            if cursor.peek() == "[":
                parts[key] = list(_json_rows(cursor, problems))
            else:
                cursor.value()  # a name, a version, a description beside the rows
            mark = cursor.take(",}")
    else:
        raise cursor.error("the file is neither a list nor an object")
    if cursor.peek():
        raise cursor.error("there is more after the end of the value")
    if not parts:
        raise DataError(
            "no list of rows in this file",
            "write a list of rows, or an object of split name to list of rows",
            file=name,
        )
    return parts


def _json_rows(cursor: _Cursor, problems: Problems) -> Iterator[Raw]:
    cursor.take("[")
    if cursor.peek() == "]":
        cursor.take("]")
        return
    while True:
        cursor.peek()
        line = cursor.line(cursor.at)
        value = cursor.value()
        if isinstance(value, dict | list):
            yield Raw(value, cursor.name, line)
        else:
            hint = 'rows are objects or lists such as ["text", "label"]; a list per column is not read'
            problems.add(f"the row is a {type(value).__name__}", hint, file=cursor.name, line=line)
        if cursor.take(",]") == "]":
            return


def read_delimited(text: str, name: str, problems: Problems, *, tabs: bool, header: bool) -> Iterator[Raw]:
    """Rows of a CSV (or, with `tabs`, TSV) file: dicts by the header's names, or lists where there is no header.

    CSV cells may be quoted and hold line breaks. TSV cells hold none; one that is quoted as a whole is unquoted.

    Raises:
        DataError: a column name stands twice.
    """
    rows = _tsv_rows(text) if tabs else _csv_rows(text, name, problems)
    names: list[str] | None = None
    width: int | None = None
    for line, cells in rows:
        if not cells or cells == [""]:
            continue
        if header and names is None:
            names = [cell.strip() for cell in cells]
            width = len(names)
            twice = sorted({cell for cell in names if cell and names.count(cell) > 1})
            if twice:
                hint = "give every column a name of its own"
                raise DataError(
                    f"the header names {', '.join(map(repr, twice))} more than once", hint, file=name, line=line
                )
            continue
        width = width or len(cells)
        if len(cells) != width:
            hint = "put a cell that holds the separator in double quotes" if not tabs else "a cell cannot hold a tab"
            problems.add(f"{len(cells)} cells where {width} are expected", hint, file=name, line=line)
            continue
        yield Raw(dict(zip(names, cells, strict=True)) if names else cells, name, line)


def _tsv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        yield number, [_unquote(cell) for cell in line.removesuffix("\r").split("\t")] if line.strip("\r") else []


def _unquote(cell: str) -> str:
    if len(cell) > 1 and cell[0] == cell[-1] == '"':
        inner = cell[1:-1]
        if '"' not in inner.replace('""', ""):
            return inner.replace('""', '"')
    return cell


def _csv_rows(text: str, name: str, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        while True:
            line = reader.line_num + 1
            try:
                yield line, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                hint = "a quote inside a quoted cell is written twice"
                problems.add(f"bad CSV: {error}", hint, file=name, line=line)
                if "unexpected end of data" in str(error):
                    return
    finally:
        csv.field_size_limit(before)
