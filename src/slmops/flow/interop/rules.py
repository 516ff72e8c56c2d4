"""The words that the tables of other trainers are written in, and what applies a table to a file.

A table maps each key of a trainer either to `To` (a place in slmops.yaml and a converter) or to `Ignored` (why there is
none). A converter answers with outcomes: `Set` a value, `Fits` where slmops does so anyhow, or `Drop` where this value
has no counterpart. Laws: every key of a file becomes at least one finding; a value that a file gives goes before a
default of its trainer. Nothing here reads a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slmops.errors import Problem, UsageError

UNKNOWN = "not known to this importer"
EMPTY = "empty, so it says nothing"


class OddError(ValueError):
    """A value that the trainer itself would not take."""

    def __init__(self, key: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.key, self.message, self.hint = key, message, hint


@dataclass(frozen=True)
class Set:
    """Write `value` at `path`. A `note` says in which way the meaning differs; `at` is a key inside the key's value."""

    path: str
    value: Any
    note: str = ""
    at: str = ""


@dataclass(frozen=True)
class Fits:
    """Nothing to write: slmops does this anyhow, or the key has done its work in another one."""

    note: str
    at: str = ""


@dataclass(frozen=True)
class Drop:
    """No counterpart. `changes`: what is learned differs without it."""

    reason: str
    changes: bool = False
    at: str = ""


Outcome = Set | Fits | Drop
Converter = Callable[["Source", str], "Outcome | Sequence[Outcome]"]


@dataclass(frozen=True)
class To:
    """A key with a counterpart. `path` is for people where the converter decides between several."""

    path: str
    convert: Converter


@dataclass(frozen=True)
class Ignored:
    """A key without one. `off`: values at which it does nothing, so that leaving it out changes nothing either.

    `harmless` tells more of such values.
    """

    reason: str
    changes: bool = False
    off: tuple[Any, ...] = (False, 0, "", "none", "no")
    harmless: Callable[[Any], bool] = lambda _value: False

    def loses(self, value: Any) -> bool:
        """Whether something else is learned without this value."""
        off = any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in self.off)
        return self.changes and not off and not self.harmless(value)


Table = Mapping[str, To | Ignored]


def because(reason: str, keys: str, *, changes: bool = False, off: tuple[Any, ...] = ()) -> dict[str, Ignored]:
    """Several keys that are ignored for one reason; `off` adds to the values at which they do nothing."""
    return {key: Ignored(reason, changes, Ignored.off + off) for key in keys.split()}


def joined(*parts: Mapping[str, Ignored]) -> dict[str, Ignored]:
    """Tables as one; a key has one reason.

    Raises:
        ValueError: a key stands in two of them.
    """
    out: dict[str, Ignored] = {}
    for part in parts:
        twice = out.keys() & part.keys()
        if twice:
            raise ValueError(f"given twice: {', '.join(sorted(twice))}")
        out.update(part)
    return out


@dataclass(frozen=True)
class Source:
    """The settings of one file by key, with typed readers that fall back on the trainer's default, then on the caller's.

    Attributes:
        file: the file.
        out: the folder of slmops.yaml; paths are written relative to it.
        values: key to value; what is empty in the file is not there.
        defaults: what the trainer takes for keys that are not there.
        places: where a key stands in the file's tree, if not simply at its name.
        rows: how many training examples there are, where it can be told.
    """

    file: Path
    out: Path
    values: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    rows: int | None = None

    def get(self, key: str) -> Any:
        """The value as it was read, or None."""
        return self.values.get(key, self.defaults.get(key))

    def number(self, key: str, default: float = 0.0) -> float:
        """A finite number; texts that are one count, as `1e-4` is a text in YAML 1.1."""
        value = self.get(key)
        if value is None:
            return default
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if not math.isfinite(found):
            raise OddError(key, f"must be a number (given: {shown(value)})")
        return int(found) if found == int(found) and not isinstance(value, float) else found

    def whole(self, key: str, default: int = 0) -> int:
        """A whole number."""
        found = self.number(key, default)
        if found != int(found):
            raise OddError(key, f"must be a whole number (given: {shown(self.get(key))})")
        return int(found)

    def flag(self, key: str, default: bool = False) -> bool:
        """Yes or no, in any of the spellings of YAML 1.1 and of command lines."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool | int) and value in (0, 1):
            return bool(value)
        if isinstance(value, str) and value.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return value.lower() in ("true", "yes", "on", "1")
        raise OddError(key, f"must be true or false (given: {shown(value)})")

    def word(self, key: str, default: str = "") -> str:
        """A text."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, str | int | float):
            return str(value).lower() if isinstance(value, bool) else str(value)
        raise OddError(key, f"must be a text (given: {shown(value)})")

    def names(self, key: str) -> tuple[str, ...]:
        """A list of texts, or one text with commas."""
        value = self.get(key)
        if value is None:
            return ()
        found = value.split(",") if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise OddError(key, f"must be names (given: {shown(value)})", "a list, or one text with commas")
        return tuple(item.strip() for item in found if item.strip())

    def choice(self, key: str, known: Iterable[str], default: str = "") -> str:
        """One of the words that the trainer knows."""
        found = self.word(key, default).lower()
        if found not in known:
            raise OddError(key, f"{found!r} is not one of: {', '.join(known)}")
        return found


def shown(value: Any) -> str:
    """A value for a message, cut after 60 characters."""
    text = " ".join(str(value).split())
    return repr(text if len(text) <= 60 else text[:57] + "…") if isinstance(value, str) else text[:60]


def share(part: float, whole: float) -> float:
    """`part / whole`, at most 1, to four digits after the point."""
    return round(min(1.0, part / whole), 4)


def number_to(path: str) -> To:
    """A number that means the same."""
    return To(path, lambda source, key: Set(path, source.number(key)))


def whole_to(path: str) -> To:
    """A whole number that means the same."""
    return To(path, lambda source, key: Set(path, source.whole(key)))


def word_to(path: str, note: str = "") -> To:
    """A text that means the same."""
    return To(path, lambda source, key: Set(path, source.word(key), note))


def flag_fits(note: str, otherwise: str, *, changes: bool = False) -> To:
    """Slmops always does what `true` asks for; `false` has no counterpart."""
    return To("always", lambda source, key: Fits(note) if source.flag(key) else Drop(otherwise, changes))


def works_through(path: str, other: str) -> To:
    """A key that another one reads."""
    return To(path, lambda _source, _key: Fits(f"taken into account with {other}"))


Kind = Literal["translated", "changed", "assumed", "ignored"]


@dataclass(frozen=True)
class Finding:
    """What became of one key.

    Attributes:
        key: as the file writes it, with dots between levels; "" for what was assumed.
        kind: `translated` with the same meaning, `changed` with another, `assumed` (the trainer's default, as the file
            does not say), or `ignored`.
        note: the change of meaning, or the reason.
        to: where it went.
        changes: for `ignored`: what is learned differs.
        line: in the file, 1-based.
    """

    key: str
    kind: Kind
    note: str = ""
    to: tuple[str, ...] = ()
    changes: bool = False
    line: int | None = None


@dataclass(frozen=True)
class Setting:
    """A value for slmops.yaml, the keys that it comes from and how its meaning differs."""

    value: Any
    keys: tuple[str, ...]
    note: str = ""
    default: bool = False


def apply(
    table: Table, source: Source, line: Callable[[tuple[str | int, ...]], int | None]
) -> tuple[dict[str, Setting], list[Finding]]:
    """What a file says in the terms of slmops.

    Args:
        table: of the trainer.
        source: the file's settings, and the trainer's defaults.
        line: of a place in the file.

    Raises:
        UsageError: values that the trainer would not take, all of them.
    """
    settings: dict[str, Setting] = {}
    findings: list[Finding] = []
    problems: list[Problem] = []
    absent = [key for key in source.defaults if key not in source.values]
    for key in (*source.values, *absent):
        given = key in source.values
        place = source.places.get(key, (key,))
        name = ".".join(str(part) for part in place)
        rule = table.get(key)
        try:
            for outcome in _outcomes(rule, source, key):
                inner = (*place, *(int(p) if p.isdigit() else p for p in outcome.at.split(".") if p))
                label = f"{name}.{outcome.at}" if outcome.at else name
                if isinstance(outcome, Set):
                    before = settings.get(outcome.path)
                    if before is not None and before.default < (not given):
                        continue
                    keys = (label,) if before is None or (before.default and given) else (*before.keys, label)
                    notes = dict.fromkeys(n for n in (before.note if before else "", outcome.note) if n)
                    settings[outcome.path] = Setting(outcome.value, keys, "; ".join(notes), not given)
                if given or isinstance(outcome, Set):
                    findings.append(_finding(outcome, label, line(inner)) if given else _assumed(outcome))
        except OddError as odd:
            where = source.places.get(odd.key, (odd.key,))
            what = ".".join(str(part) for part in where)
            problems.append(Problem(odd.message, odd.hint, source.file.name, line(where), what))
    if problems:
        listing = "\n".join(f"  {problem}" for problem in dict.fromkeys(problems))
        raise UsageError(f"{source.file.name} cannot be imported:\n{listing}", "mend the file, then import it again")
    return settings, merged(findings)


def _outcomes(rule: To | Ignored | None, source: Source, key: str) -> Sequence[Outcome]:
    if rule is None:
        return [Drop(UNKNOWN, changes=True)]
    if isinstance(rule, Ignored):
        return [Drop(rule.reason, rule.loses(source.get(key)))]
    found = rule.convert(source, key)
    return [found] if isinstance(found, Set | Fits | Drop) else found


def _assumed(outcome: Outcome) -> Finding:
    assert isinstance(outcome, Set)
    return Finding("", "assumed", outcome.note, (outcome.path,))


def _finding(outcome: Outcome, key: str, line: int | None) -> Finding:
    if isinstance(outcome, Drop):
        return Finding(key, "ignored", outcome.reason, (), outcome.changes, line)
    if isinstance(outcome, Fits):
        return Finding(key, "translated", outcome.note, (), False, line)
    return Finding(key, "changed" if outcome.note else "translated", outcome.note, (outcome.path,), False, line)


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Findings about the same key and of the same kind as one; of assumptions, those about the same place."""
    found: dict[tuple[Any, bool], Finding] = {}
    for finding in findings:
        key = (finding.key or finding.to, finding.kind == "ignored")
        before = found.get(key)
        if before is None:
            found[key] = finding
            continue
        notes = "; ".join(dict.fromkeys(note for note in (before.note, finding.note) if note))
        kind: Kind = "changed" if "changed" in (before.kind, finding.kind) else before.kind
        to = tuple(dict.fromkeys((*before.to, *finding.to)))
        found[key] = Finding(finding.key, kind, notes, to, before.changes or finding.changes, before.line)
    return list(found.values())
