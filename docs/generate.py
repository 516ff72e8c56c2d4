"""Regenerate the reference pages from the code: docs/reference/{cli,spec,import}.md. `make docs` runs this.

A test compares the pages with what this script makes, so they cannot fall behind.
"""

from __future__ import annotations

import argparse
import os
import types
import typing
from pathlib import Path
from typing import Any

os.environ["COLUMNS"] = "100"

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from slmops.cli.main import parser
from slmops.core.spec import Spec
from slmops.flow.interop import TRAINERS, axolotl_data, olive_form
from slmops.flow.interop.rules import Ignored, To

REFERENCE = Path(__file__).parent / "reference"


def cli() -> str:
    """The help text of every command."""
    top = parser()
    parts = ["# Command line\n\nMade by `make docs` from the commands' own `--help`.\n", _block(top.format_help())]
    actions = [a for a in top._actions if isinstance(a, argparse._SubParsersAction)]
    for name, verb in actions[0].choices.items():
        parts.append(f"\n## slmops {name}\n\n{_block(verb.format_help())}")
    return "\n".join(parts)


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


def spec() -> str:
    """Every key of slmops.yaml with type, default and meaning."""
    parts = [
        "# slmops.yaml\n",
        "Made by `make docs` from `slmops.core.spec`. YAML 1.2, strict: an unknown key or a wrong type is an error with",
        "its line. Paths are relative to the file. Any key can be overridden: `--set train.epochs=3`.\n",
        _table(Spec),
    ]
    seen: list[type[BaseModel]] = []
    _collect(Spec, seen)
    for model in seen:
        parts.append(f"\n## {model.__name__}\n")
        if model.__doc__:
            parts.append(" ".join(line.strip() for line in model.__doc__.strip().splitlines()) + "\n")
        parts.append(_table(model))
    return "\n".join(parts)


def _collect(model: type[BaseModel], seen: list[type[BaseModel]]) -> None:
    for field in model.model_fields.values():
        for inner in _models(field.annotation):
            if inner not in seen:
                seen.append(inner)
                _collect(inner, seen)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in _models(inner)]


def _table(model: type[BaseModel]) -> str:
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        annotation = _type(field.annotation)
        bounds = _bounds(field.metadata)
        rows.append(f"| `{name}` | {annotation}{bounds} | {_default(field)} | {field.description or ''} |")
    return "\n".join(rows) + "\n"


def _bounds(metadata: list[Any]) -> str:
    found = []
    for item in metadata:
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            value = getattr(item, name, None)
            if value is not None:
                found.append(f"{sign} {value:g}")
    return f" ({', '.join(found)})" if found else ""


def _type(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _type(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        inner = [_type(a) for a in typing.get_args(annotation) if a is not type(None)]
        return " or ".join(dict.fromkeys(inner))
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if origin is tuple:
        return f"list of {_type(typing.get_args(annotation)[0])}"
    if origin is dict:
        return f"map to {_type(typing.get_args(annotation)[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any value"}.get(
        annotation, str(annotation)
    )


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required" if field.default_factory is None else "empty"
    value = field.default
    if value is None:
        return "unset"
    if isinstance(value, BaseModel):
        return "see there"
    if isinstance(value, tuple):
        return ", ".join(f"`{v}`" for v in value) or "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value != "" else "empty"


def imports() -> str:
    """Every key that `slmops import` knows, by trainer: where it goes, or why it goes nowhere."""
    parts = [
        "# Keys of other trainers\n",
        "Made by `make docs` from `slmops.flow.interop`. A key that is in no table is named as unknown by the import. A star",
        "marks keys without which something else is learned, unless they are switched off: `--strict` refuses them.\n",
    ]
    for trainer in TRAINERS.values():
        parts += [f"\n## {trainer.NAME}\n", _keys(trainer.TRANSLATED, trainer.IGNORED)]
        if trainer.NAME == axolotl_data.TRAINER:
            parts += ["\n### Entries of `datasets`\n", _keys(axolotl_data.TRANSLATED, axolotl_data.IGNORED)]
    return "\n".join(parts)


def _keys(translated: dict[str, To], ignored: dict[str, Ignored]) -> str:
    options = {key: option for option, key in olive_form.OPTIONS.items()}
    words = {"always": "what slmops does anyhow", "none": "an error: it has no counterpart"}
    by_place: dict[str, list[str]] = {}
    for key, rule in translated.items():
        option = options.get(key)
        by_place.setdefault(rule.path, []).append(f"`{option}` (`{key}`)" if option else f"`{key}`")
    rows = ["| key | becomes |", "| --- | --- |"]
    for place, keys in by_place.items():
        shown = words.get(place, place if " " in place else f"`{place}`")
        rows.append(f"| {', '.join(keys)} | {shown} |")
    by_reason: dict[str, list[str]] = {}
    for key, reason in ignored.items():
        star = "\\*" if reason.changes else ""
        by_reason.setdefault(reason.reason, []).append(f"`{key}`{star}")
    rows += ["", "| ignored | because |", "| --- | --- |"]
    rows += [f"| {', '.join(keys)} | {reason} |" for reason, keys in by_reason.items()]
    return "\n".join(rows) + "\n"


PAGES = {"cli.md": cli, "spec.md": spec, "import.md": imports}


def main() -> None:
    """Write the pages."""
    REFERENCE.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        (REFERENCE / name).write_text(make())
        print(REFERENCE / name)


if __name__ == "__main__":
    main()
