"""`slmops compare`: two models or runs, paired, on the same examples."""

from __future__ import annotations

import argparse
from pathlib import Path

from slmops.cli.common import json_argument, open_project, print_json, project_arguments
from slmops.errors import UsageError

HELP = "compare two models or runs, paired, on the same examples"

EPILOG = """\
A and B are variants of the last run (student-int4, teacher-fp32, few-int4, …), or folders or files with
predictions.jsonl, or another project's variant as FILE:VARIANT (examples/x/slmops.yaml:student-int4)."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `compare` takes."""
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    project_arguments(parser)
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Find both sets of predictions and compare them."""
    from slmops.evaluate.compare import Side, compare, render_comparison

    task = open_project(options).spec.task
    sides = [Side(name, _predictions(options, name)) for name in (options.a, options.b)]
    result = compare(sides[0], sides[1], task)
    if options.json:
        print_json(result)
    else:
        print(render_comparison(result))
    return 0


def _predictions(options: argparse.Namespace, name: str) -> Path:
    from slmops.flow.project import load
    from slmops.flow.state import State

    path = Path(name)
    if path.is_dir() and (path / "predictions.jsonl").is_file():
        return path / "predictions.jsonl"
    if path.is_file() and path.suffix == ".jsonl":
        return path
    file, colon, variant = name.rpartition(":")
    project = load(Path(file)) if colon else open_project(options)
    state = State(project)
    survey = state.survey(project.plan())
    found = {s.step.id.removeprefix("predict-"): s for s in survey if s.step.id.startswith("predict-")}
    if variant not in found:
        raise UsageError(f"there is no variant {variant}", f"variants: {', '.join(found)}; or give a predictions.jsonl")
    output = found[variant].output
    if output is None:
        raise UsageError(f"the predictions of {variant} are not made yet, or not up to date", "run `slmops run` first")
    return state.store.path(output) / "predictions.jsonl"
