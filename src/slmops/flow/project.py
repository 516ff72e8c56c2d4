"""Reading slmops.yaml: YAML 1.2, strict, every problem at once with its line and a hint.

Laws: a file that reads without error gives a `Spec` in which every key was understood; `--set a.b=value` acts exactly
as if the file said it (the value is read as YAML), and a path given that way is relative to where the user stands.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from slmops.core.fit import FitSpec
from slmops.core.spec import Spec
from slmops.core.step import Step
from slmops.errors import Problem, SpecError, UsageError

FILE_NAME = "slmops.yaml"
PATH_KEYS = ("data.path", "teacher.base", "student.base")
_NAMED_PATH = re.compile(r"adapters\.[^.]+\.data\.path|convert\.olive\.[^.]+")
SEE = "mend the file and run the same command again; every key is explained in docs/reference/spec.md"


@dataclass(frozen=True)
class Places:
    """Where the keys of a project stand: in its file, or among the overrides of the command line."""

    file: str
    tree: Any
    overrides: tuple[str, ...]

    def find(self, problem: Problem) -> Problem:
        """The problem with file and line; one that an override brought in says `--set` instead."""
        given = [key for key in self.overrides if f"{problem.path}.".startswith(f"{key}.")]
        if given:
            return replace(problem, file="--set", line=None)
        loc = tuple(int(part) if part.isdigit() else part for part in problem.path.split(".") if part)
        return replace(problem, file=self.file, line=line_of(self.tree, loc))


@dataclass(frozen=True)
class Project:
    """A project: its file, the folder that the file stands in, what it says, and where it says it."""

    file: Path
    root: Path
    spec: Spec
    places: Places | None = field(default=None, compare=False, repr=False)

    def plan(self) -> tuple[Step, ...]:
        """The steps of the project; see `slmops.flow.planner.plan`.

        Raises:
            SpecError: stages that do not fit each other, all of them at once, with their lines.
        """
        from slmops.flow.planner import plan

        try:
            return plan(self.spec)
        except SpecError as error:
            raise self.wrong(error.problems) from None

    def wrong(self, problems: Sequence[Problem]) -> SpecError:
        """The error for problems of the file, with their lines."""
        return SpecError([self.places.find(problem) if self.places else problem for problem in problems], SEE)

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
        return (self.root / _expanded(path)).resolve()


def _expanded(path: str) -> Path:
    """A path with `~` resolved; where there is no such user it is a plain name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


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
    tree = read_tree(file)
    places = Places(file.name, tree, tuple(_override(tree, override) for override in overrides))
    odd = list(_odd_values(tree))
    if odd:
        raise SpecError([places.find(problem) for problem in odd], SEE)
    try:
        spec = Spec.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise SpecError([places.find(problem) for problem in spec_problems(error)], SEE) from None
    if spec.search is not None:
        from slmops.flow import search_space

        wrong = search_space.problems(spec)
        if wrong:
            raise SpecError([places.find(problem) for problem in wrong], SEE)
    if spec.fit != FitSpec():
        from slmops.flow import fit_plan

        wrong = fit_plan.problems(spec)
        if wrong:
            raise SpecError([places.find(problem) for problem in wrong], SEE)
    return Project(file.resolve(), file.resolve().parent, spec, places)


def read_tree(
    file: Path, what: str = "the project file", see: str = SEE, start: str = "start with `name:`", *, old: bool = False
) -> CommentedMap:
    """The mapping that a YAML file holds, with the place of each key.

    Args:
        file: the file to read.
        what: the kind of file, for the head of an error.
        see: the hint of an error.
        start: the hint for a file without a mapping.
        old: read YAML 1.1 (`no` is false), as most Python programs do.

    Raises:
        UsageError: it cannot be read.
        SpecError: not UTF-8, not YAML, or not a mapping; with the line.
    """

    def wrong(message: str, hint: str, line: int | None = None) -> SpecError:
        return SpecError([Problem(message, hint, file.name, line)], see, what)

    reader = YAML(typ="rt")
    if old:
        reader.version = (1, 1)
    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}", "check its permissions") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of YAML 1.1, about numbers such as 1e-4
            tree = reader.load(content.decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise wrong(f"byte 0x{content[error.start]:02x} is not UTF-8", "save the file as UTF-8", line) from None
    except ReaderError as error:
        line = content.decode().count("\n", 0, error.position) + 1
        raise wrong("a control character, which no YAML file may hold", "remove it", line) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        message = " ".join(str(error.problem or error.context or "not valid YAML").split())
        where = mark.line + 1 if mark else None
        raise wrong(message, "YAML 1.2; indent with spaces", where) from None
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        message = (str(error).splitlines() or ["not valid YAML"])[0]
        raise wrong(message, "YAML 1.2") from None
    if not isinstance(tree, CommentedMap):
        raise wrong("the file is empty or not a mapping", start, 1)
    return tree


def _odd_values(node: Any, path: str = "", above: tuple[int, ...] = ()) -> Iterator[Problem]:
    """What YAML can say but a project file cannot: tags, dates, infinity, keys that are no words, circles."""
    if isinstance(node, dict | list):
        if id(node) in above:
            yield Problem("refers to itself", "write the value out", path=path)
            return
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            inner = f"{path}.{key}" if path else str(key)
            if not isinstance(key, str | int) or (isinstance(key, str) and not _is_text(key)):
                yield Problem("a key that is not a word", "write it as key: value", path=path)
            else:
                yield from _odd_values(value, inner, (*above, id(node)))
    elif isinstance(node, str):
        if not _is_text(node):
            yield Problem("holds a NUL or half of a surrogate pair", "write it as plain text", path=path)
    elif isinstance(node, float) and not math.isfinite(node):
        yield Problem("must be a finite number", "leave the key out for its default", path=path)
    elif not isinstance(node, int | float | bool | None):
        yield Problem(
            f"not a plain value: {' '.join(str(node).split())[:60]}", "put it in quotes, without a tag", path=path
        )


def _is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= char <= "\udfff" for char in value)


def _override(tree: Any, text: str) -> str:
    """Put an override into the tree; returns its key."""
    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UsageError(f"--set {text}: not key=value", "for instance --set train.epochs=3")
    try:
        value = YAML(typ="safe").load(raw) if raw.strip() else None
    except YAMLError:
        value = raw
    if (
        (key.strip() in PATH_KEYS or _NAMED_PATH.fullmatch(key.strip()))
        and isinstance(value, str)
        and not value.startswith("hf:")
    ):
        value = str(_expanded(value).resolve())
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
    return key.strip()


def spec_problems(error: ValidationError, root: type[BaseModel] = Spec) -> list[Problem]:
    """What pydantic found wrong with a file of the form `root`, in our words, without lines."""
    return [_problem(detail, root) for detail in _merged(error)]


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
    names = {
        "str",
        "int",
        "float",
        "bool",
        "constrained-str",
        "constrained-int",
        "constrained-float",
        "TokenizerSpec",
        "[key]",
    }
    return part in names or part.startswith(("tuple[", "literal[", "function-", "float-"))


def _problem(detail: Any, root: type[BaseModel]) -> Problem:
    """What pydantic found, in our words; its place is for `Places.find` to add."""
    loc = detail["loc"]
    path = ".".join(str(part) for part in loc)
    kind, message = detail["type"], detail["msg"]
    value = detail.get("input")
    hint = ""
    if kind == "extra_forbidden":
        allowed = _fields_at(loc[:-1], root)
        close = difflib.get_close_matches(str(loc[-1]), allowed, n=1, cutoff=0.5)
        message = "unknown key"
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(allowed)}"
    elif kind == "missing":
        message, hint = "is missing", _hint_of(loc, root)
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
        hint = _hint_of(loc, root)
    return Problem(message, hint, path=path)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def line_of(tree: Any, loc: tuple[Any, ...]) -> int | None:
    """The 1-based line of a key, or of the nearest one above it that is there."""
    node, line, skip = tree, None, 0
    for i, part in enumerate(loc):
        if skip:  # inside a key that has dots itself, as those of search.parameters
            skip -= 1
            continue
        try:
            if isinstance(node, CommentedMap) and (key := _key_at(node, loc[i:])) is not None:
                line = node.lc.key(key)[0] + 1
                skip, node = str(key).count("."), node[key]
            elif isinstance(node, CommentedSeq) and isinstance(part, int) and part < len(node):
                line = node.lc.item(part)[0] + 1
                node = node[part]
            else:
                break
        except (KeyError, TypeError, AttributeError):
            break
    return line


def _key_at(node: CommentedMap, loc: tuple[Any, ...]) -> Any:
    """The key of a mapping that the next parts of a place name, None if it has none."""
    joined = (".".join(str(part) for part in loc[:end]) for end in range(2, len(loc) + 1))
    return next((key for key in (loc[0], *joined) if key in node), None)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, list, dict, typing.Annotated):
        return [model for inner in typing.get_args(annotation) for model in _models(inner)]
    return []


def _model_at(loc: tuple[Any, ...], root: type[BaseModel] = Spec) -> type[BaseModel] | None:
    model = root
    named = False
    for part in loc:
        if isinstance(part, int) or named:  # a place in a list, a name in a mapping
            named = False
            continue
        field = model.model_fields.get(part)
        inner = _models(field.annotation) if field else []
        if not field or not inner:
            return None
        model, named = inner[0], typing.get_origin(field.annotation) is dict
    return model


def annotations_at(loc: tuple[str, ...]) -> Any:
    """The type of a key of the project file, None where there is no such key."""
    model = _model_at(loc[:-1])
    field = model.model_fields.get(loc[-1]) if model else None
    return field.annotation if field else None


def _fields_at(loc: tuple[Any, ...], root: type[BaseModel] = Spec) -> list[str]:
    model = _model_at(loc, root)
    return sorted(model.model_fields) if model else []


def _hint_of(loc: tuple[Any, ...], root: type[BaseModel] = Spec) -> str:
    model = _model_at(loc[:-1], root)
    field = model.model_fields.get(str(loc[-1])) if model else None
    return (field.description or "") if field else ""
