"""Reading slmops.yaml: YAML 1.2, strict, every problem at once with its line and a hint.

Laws: a file that reads without error gives a `Spec` in which every key was understood; `--set a.b=value` acts exactly
as if the file said it (the value is read as YAML), and a path given that way is relative to where the user stands.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from slmops.core.spec import Spec
from slmops.errors import Problem, SpecError, UsageError

FILE_NAME = "slmops.yaml"
PATH_KEYS = ("data.path", "teacher.base", "student.base")


@dataclass(frozen=True)
class Project:
    """A project: its file, the folder that the file stands in, and what it says."""

    file: Path
    root: Path
    spec: Spec

    @property
    def state(self) -> Path:
        """The folder in which slmops keeps what it made."""
        return self.root / ".slmops"

    @property
    def outputs(self) -> Path:
        """The folder in which users find reports and bundles."""
        return self.root / "outputs" / self.spec.name

    def resolve(self, path: str) -> Path:
        """A path of the file, relative to the file's folder."""
        return (self.root / Path(path).expanduser()).resolve()


def load(file: Path, overrides: Sequence[str] = ()) -> Project:
    """Read a project file.

    Args:
        file: the file, or the folder that holds slmops.yaml.
        overrides: `key.path=value` texts.

    Raises:
        UsageError: no such file, or an override that is not `key=value`.
        SpecError: everything that is wrong in the file, with lines.
    """
    if file.is_dir():
        file = file / FILE_NAME
    if not file.is_file():
        raise UsageError(f"there is no {file}", "make a project with `slmops init NAME`, or give its file with -f FILE")
    tree = _read(file)
    for override in overrides:
        _override(tree, override)
    try:
        spec = Spec.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise SpecError(
            [_problem(detail, tree, file) for detail in _merged(error)], "see docs/reference/spec.md"
        ) from None
    except (TypeError, ValueError) as error:
        raise SpecError([Problem(f"not a plain value: {error}", file=file.name)]) from None
    return Project(file.resolve(), file.resolve().parent, spec)


def _read(file: Path) -> Any:
    reader = YAML(typ="rt")
    try:
        text = file.read_bytes().decode("utf-8-sig")
        tree = reader.load(text)
    except UnicodeDecodeError as error:
        raise SpecError([Problem(f"not UTF-8 (byte {error.start})", "save the file as UTF-8", file.name)]) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        message = " ".join(str(error.problem or error.context or "not valid YAML").split())
        line = mark.line + 1 if mark else None
        raise SpecError([Problem(message, "YAML 1.2; indent with spaces", file.name, line)]) from None
    except YAMLError as error:
        raise SpecError([Problem(str(error).splitlines()[0], "YAML 1.2", file.name)]) from None
    if not isinstance(tree, CommentedMap):
        raise SpecError([Problem("the file is empty or not a mapping", "start with `name:`", file.name, 1)])
    return tree


def _override(tree: Any, text: str) -> None:
    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UsageError(f"--set {text}: not key=value", "for instance --set train.epochs=3")
    try:
        value = YAML(typ="safe").load(raw) if raw.strip() else None
    except YAMLError:
        value = raw
    if key.strip() in PATH_KEYS and isinstance(value, str) and not value.startswith("hf:"):
        value = str(Path(value).expanduser().resolve())
    node = tree
    for part in parts[:-1]:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
            continue
        if not isinstance(node, dict):
            raise UsageError(f"--set {text}: {part} is inside a value that has no keys", "check the key's path")
        if not isinstance(node.get(part), dict | list):
            node[part] = CommentedMap()
        node = node[part]
    if isinstance(node, list):
        if not parts[-1].isdigit() or int(parts[-1]) >= len(node):
            raise UsageError(f"--set {text}: no such place in the list", "count from 0")
        node[int(parts[-1])] = value
    else:
        node[parts[-1]] = value


def _merged(error: ValidationError) -> list[Any]:
    """Errors of the branches of a union come one a branch; keep one for each place."""
    seen: dict[tuple[Any, ...], Any] = {}
    for detail in error.errors(include_url=False):
        loc = tuple(part for part in detail["loc"] if not _is_branch(part))
        kept = seen.get(loc)
        if kept is None or detail["type"] != "none_required":
            seen.setdefault(loc, {**detail, "loc": loc, "types": []})
        seen[loc]["types"].append(detail["type"])
    return list(seen.values())


def _is_branch(part: Any) -> bool:
    if not isinstance(part, str):
        return False
    names = {"str", "int", "float", "bool", "constrained-str", "constrained-int", "constrained-float", "TokenizerSpec"}
    return part in names or part.startswith(("tuple[", "literal[", "function-", "float-"))


def _problem(detail: Any, tree: Any, file: Path) -> Problem:
    loc = detail["loc"]
    path = ".".join(str(part) for part in loc)
    line = _line(tree, loc)
    kind, message = detail["type"], detail["msg"]
    value = detail.get("input")
    hint = ""
    if kind == "extra_forbidden":
        allowed = _fields_at(loc[:-1])
        close = difflib.get_close_matches(str(loc[-1]), allowed, n=1, cutoff=0.5)
        message = "unknown key"
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(allowed)}"
    elif kind == "missing":
        message, hint = "is missing", _hint_of(loc)
    elif kind == "literal_error":
        allowed = [text.strip("'") for text in detail["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        close = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        message = f"{value!r} is not one of: {', '.join(allowed)}"
        hint = f"did you mean {close[0]}?" if close else ""
    elif kind == "value_error":
        message = message.removeprefix("Value error, ")
    else:
        message = message.removeprefix("Input ").replace("should be", "must be").replace("should have", "must have")
        message = f"{message} (given: {_shown(value)})"
        hint = _hint_of(loc)
    return Problem(message, hint, file.name, line, path)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def _line(tree: Any, loc: tuple[Any, ...]) -> int | None:
    node, line = tree, None
    for part in loc:
        try:
            if isinstance(node, CommentedMap) and part in node:
                line = node.lc.key(part)[0] + 1
                node = node[part]
            elif isinstance(node, CommentedSeq) and isinstance(part, int) and part < len(node):
                line = node.lc.item(part)[0] + 1
                node = node[part]
            else:
                break
        except (KeyError, TypeError, AttributeError):
            break
    return line


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, list, typing.Annotated):
        return [model for inner in typing.get_args(annotation) for model in _models(inner)]
    return []


def _model_at(loc: tuple[Any, ...]) -> type[BaseModel] | None:
    model: type[BaseModel] = Spec
    for part in loc:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inner = _models(field.annotation) if field else []
        if not inner:
            return None
        model = inner[0]
    return model


def _fields_at(loc: tuple[Any, ...]) -> list[str]:
    model = _model_at(loc)
    return sorted(model.model_fields) if model else []


def _hint_of(loc: tuple[Any, ...]) -> str:
    model = _model_at(loc[:-1])
    field = model.model_fields.get(str(loc[-1])) if model else None
    return (field.description or "") if field else ""
