"""Reads what other trainers were told and says it in the terms of slmops: LLaMA-Factory, Axolotl and Olive's finetune.

Laws: every key of the file becomes a finding, translated or ignored with the reason; what a trainer takes by default and
slmops would take otherwise is written out; the text that comes out is for `slmops.flow.project` to read. Nothing is
written here, no data are read but to count rows, and no code of another trainer is run.

A trainer is a module with `NAME`, its tables `TRANSLATED` and `IGNORED` (see `rules`) and what it takes by `defaults`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slmops.errors import Problem, SpecError, UsageError
from slmops.flow.interop import axolotl, llamafactory, olive
from slmops.flow.interop.olive_form import Place, command, flatten
from slmops.flow.interop.render import render
from slmops.flow.interop.rules import EMPTY, Finding, Kind, Setting, Source, To, apply
from slmops.flow.project import line_of, read_tree

TRAINERS: dict[str, Any] = {"llamafactory": llamafactory, "axolotl": axolotl, "olive": olive}
SEE = "keys that are known: docs/reference/import.md"
_KEYS = {
    "llamafactory": frozenset(llamafactory.TABLE),
    "axolotl": frozenset(axolotl.TABLE),
    "olive": olive.KEYS,
}
MARKS = {
    name: keys - frozenset().union(*(other for key, other in _KEYS.items() if key != name))
    for name, keys in _KEYS.items()
}
"""Keys at the top of a file that only one trainer has."""


@dataclass(frozen=True)
class Imported:
    """A file in the terms of slmops.

    Attributes:
        trainer: `llamafactory`, `axolotl` or `olive`.
        name: the trainer's name for people.
        settings: values by their place in slmops.yaml.
        findings: what became of each key, in the order of the file; then what was assumed.
        text: slmops.yaml.
    """

    trainer: str
    name: str
    settings: Mapping[str, Setting]
    findings: tuple[Finding, ...]
    text: str

    @property
    def lost(self) -> tuple[Finding, ...]:
        """Ignored keys without which something else is learned."""
        return tuple(finding for finding in self.findings if finding.kind == "ignored" and finding.changes)


def read(file: Path, trainer: str = "auto", out: Path | None = None) -> Imported:
    """Translate a file.

    Args:
        file: YAML or JSON, or a text with one `olive finetune` command.
        trainer: a key of `TRAINERS`, or `auto` to tell by the keys.
        out: where slmops.yaml will be; paths in it are relative to that folder.

    Raises:
        UsageError: the file is not there, not YAML, not of this trainer, or says what slmops cannot do at all.
    """
    if not file.is_file():
        raise UsageError(f"there is no file {file}", "give the file that the other trainer was started with")
    tree = _tree(file)
    trainer = _chosen(trainer, tree, file)
    module = TRAINERS[trainer]
    values, places = flatten(tree) if trainer == "olive" else (dict(tree), {})
    given = {key: value for key, value in values.items() if value is not None}
    source = Source(file, out.parent if out is not None else Path(), given, {}, places)
    source = replace(source, defaults=module.defaults(source))
    with contextlib.suppress(ValueError):  # a wrong value: found again, with its line, with its own key
        source = replace(source, rows=module.rows(source))
    table = module.table(source) if hasattr(module, "table") else module.TABLE
    settings, findings = apply(table, source, lambda place: line_of(tree, place))
    for key in values:
        if key not in given:
            place: Place = places.get(key, (key,))
            kind: Kind = "translated" if isinstance(table.get(key), To) else "ignored"
            findings.append(Finding(".".join(map(str, place)), kind, EMPTY, line=line_of(tree, place)))
    findings.sort(key=lambda finding: finding.line or 1 << 30)
    for path, (value, note) in getattr(module, "ALWAYS", {}).items():
        settings.setdefault(path, Setting(value, (), note, default=True))
        findings.append(Finding("", "assumed", note, (path,)))
    findings += [Finding("", "assumed", note, (path,)) for path, note in module.assumed(source).items()]
    _complete(module, settings, findings, file)
    text = render(settings, findings, file.name, module.NAME)
    return Imported(trainer, module.NAME, settings, tuple(findings), text)


def _complete(module: Any, settings: dict[str, Setting], findings: list[Finding], file: Path) -> None:
    """What slmops needs and no trainer says."""
    for path, key in module.NEEDS.items():
        if path not in settings:
            raise UsageError(
                f"{file.name} has no {key}, and slmops needs {path}", f"add `{key}:` as {module.NAME} has it"
            )
    plain = {path: setting.value for path, setting in settings.items()}
    task = module.task(plain)
    guess = "a guess: classification, extraction, question_answering and summarisation have their own metrics"
    settings["name"] = Setting(_name(file), (), "from the name of the file")
    settings["task.type"] = Setting(task, (), guess)
    findings.append(Finding("", "assumed", guess, ("task.type",)))
    if "data.splits.validation" not in settings:
        findings.append(Finding("", "assumed", "a share of the data, by content: 0.1", ("data.splits.validation",)))
    findings.append(Finding("", "assumed", "a share of the data, by content: 0.15", ("data.splits.test",)))


def _name(file: Path) -> str:
    plain = re.sub(r"[^a-z0-9._-]+", "-", file.stem.lower()).strip("._-")[:63].rstrip("._-")
    return plain or "imported"


def _tree(file: Path) -> Mapping[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        text = ""
    options = command(text)
    if options is not None:
        return options
    start = "give the YAML or JSON of a training, which maps keys to values"
    if text.lstrip()[:1] == "{" and "\t" in text:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if isinstance(value, dict):
            return value
    tree = read_tree(file, file.name, SEE, start, old=True)
    odd = [key for key in tree if not isinstance(key, str)]
    if odd:
        problem = Problem(
            f"the key {odd[0]!r} is not a word", "write it as key: value", file.name, line_of(tree, (odd[0],))
        )
        raise SpecError([problem], SEE, file.name)
    _whole(tree)
    return tree


def _whole(node: Any, above: tuple[int, ...] = ()) -> None:
    """Join halves of surrogate pairs, as JSON escapes write them, in place; halves that stand alone become U+FFFD."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, dict | list) and id(value) not in above:
            _whole(value, (*above, id(value)))
        elif isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
            node[key] = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def detect(tree: Mapping[str, Any]) -> dict[str, list[str]]:
    """Keys that only one trainer has, by trainer, most first."""
    found = {name: [key for key in tree if key in marks] for name, marks in MARKS.items()}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _chosen(trainer: str, tree: Mapping[str, Any], file: Path) -> str:
    found = detect(tree)
    (best, keys), (_second, fewer) = list(found.items())[:2]
    if trainer == "auto":
        if len(keys) == len(fewer):
            what = "could be of several trainers" if keys else "has no key by which a trainer could be told"
            raise UsageError(f"{file.name} {what}", f"say which with --from {', --from '.join(TRAINERS)}")
        return best
    if len(found[trainer]) < len(keys):
        names = {name: TRAINERS[name].NAME for name in TRAINERS}
        key = keys[0]
        problem = Problem(
            f"only {names[best]} has this key, not {names[trainer]}", "", file.name, line_of(tree, (key,)), key
        )
        raise SpecError([problem], f"use --from {best}, or leave --from out", file.name)
    return trainer
