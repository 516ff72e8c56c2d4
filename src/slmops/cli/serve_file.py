"""Reading a file of models to serve: strict, every problem at once with its line, paths relative to the file."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.errors import Problem, SpecError, UsageError

if TYPE_CHECKING:
    from slmops.serve.app import Trial
    from slmops.serve.config import ServeSpec
    from slmops.serve.model import Settings

WHAT = "the file of models"
SEE = "mend the file and start the server again; docs/guides/serve.md explains every key"


def read(file: Path) -> ServeSpec:
    """What a file says.

    Raises:
        UsageError: it cannot be read.
        SpecError: everything that is wrong in it, with lines.
    """
    from pydantic import ValidationError

    from slmops.cli.fit import amount
    from slmops.flow.project import line_of, read_tree, spec_problems
    from slmops.serve.config import ServeSpec

    if not file.is_file():
        raise UsageError(f"there is no {file}", "give a file of models with --config FILE")
    tree = read_tree(file, WHAT, SEE, "start with `models:`")

    def placed(problem: Problem) -> Problem:
        place = tuple(int(part) if part.isdigit() else part for part in problem.path.split(".") if part)
        return replace(problem, file=file.name, line=line_of(tree, place))

    try:
        spec = ServeSpec.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise SpecError([placed(problem) for problem in spec_problems(error, ServeSpec)], SEE, WHAT) from None
    wrong = []
    if spec.memory is not None:
        try:
            amount(str(spec.memory))
        except argparse.ArgumentTypeError as error:
            wrong.append(Problem(str(error), "such as 500M or 4G", path="memory"))
    for name, model in spec.models.items():
        here = f"models.{name}"
        if model.fallback is not None and (model.fallback == name or model.fallback not in spec.models):
            others = ", ".join(other for other in spec.models if other != name) or "none"
            wrong.append(Problem(f"{model.fallback} is no other model", f"others: {others}", path=f"{here}.fallback"))
        paths = {"folder": model.folder, "canaries": model.canaries}
        paths |= {f"adapters.{adapter}": place for adapter, place in model.adapters.items()}
        for key, path in paths.items():
            if path is not None and not (file.parent / path).exists():
                wrong.append(Problem(f"there is no {path}", "paths are relative to this file", path=f"{here}.{key}"))
        if model.candidate is not None and not (file.parent / model.candidate.folder).exists():
            said = f"there is no {model.candidate.folder}"
            wrong.append(Problem(said, "paths are relative to this file", path=f"{here}.candidate.folder"))
    if wrong:
        raise SpecError([placed(problem) for problem in wrong], SEE, WHAT)
    return spec


def settings(spec: ServeSpec, file: Path, given: Settings) -> list[Settings]:
    """How each model is served. `given`: what holds where the file says nothing."""
    found = []
    for name, model in spec.models.items():
        own: dict[str, Any] = {}
        for key in ("rows", "context", "threads", "queue", "load", "idle", "engine"):
            value = getattr(model, key)
            if value is not None:
                own[key] = value
        if model.tell is not None:
            own["tell_ms"] = model.tell
        own["adapters"] = {adapter: file.parent / place for adapter, place in model.adapters.items()}
        own["canaries"] = file.parent / model.canaries if model.canaries else None
        found.append(replace(given, folder=file.parent / model.folder, name=name, fallback=model.fallback, **own))
    return found


def trials(spec: ServeSpec, file: Path) -> list[Trial]:
    """The candidates."""
    from slmops.serve.app import Trial

    return [
        Trial(name, file.parent / model.candidate.folder, model.candidate.share, model.candidate.shadow)
        for name, model in spec.models.items()
        if model.candidate is not None
    ]
