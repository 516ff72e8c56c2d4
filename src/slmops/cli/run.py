"""`slmops run`: bring the project to its end; resume; do nothing when there is nothing to do."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.cli.common import (
    json_argument,
    on_argument,
    open_project,
    print_json,
    project_arguments,
    say,
    seconds,
    size,
)
from slmops.core import forms
from slmops.core.layout import columns
from slmops.errors import UsageError

if TYPE_CHECKING:
    from slmops.core.step import Step
    from slmops.flow.runner import Options, Result
    from slmops.flow.state import State

HELP = "run what is not cached, with progress; a killed run goes on where it was"

CODES = {"passed": 0, "failed": 3, "undecided": 4}


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    parser.add_argument("steps", nargs="*", metavar="STEP", help="run only what these steps need (default: everything)")
    project_arguments(parser)
    parser.add_argument(
        "--strict", action="store_true", help="test data found in training data is an error, not a repair"
    )
    parser.add_argument("--budget", type=float, metavar="MONEY", help="most to spend on endpoints in this run")
    parser.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="at most N steps beside each other (default: as cores allow)"
    )
    on_argument(parser)
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Run the plan and print the verdict."""
    from slmops.flow.estimate import estimate, total, trainings
    from slmops.flow.memory import require as require_memory
    from slmops.flow.ray_executor import check_on
    from slmops.flow.runner import Options, Result, export, preflight, selected
    from slmops.flow.state import State
    from slmops.flow.tracking import Tracker, backends
    from slmops.flow.tracking import require as require_trackers
    from slmops.store.files import read_json

    begin = time.monotonic()
    address = check_on(options.on)
    project = open_project(options)
    if options.budget is not None and not 0 <= options.budget < math.inf:
        raise UsageError(
            f"--budget {options.budget:g} is not an amount", "give the most money to spend, for instance --budget 5"
        )
    if options.jobs < 0:
        raise UsageError("--jobs must not be negative", "0, the default, means as many as the cores allow")
    require_trackers(project.spec.tracking)
    state = State(project)
    steps = tuple(selected(project.plan(), options.steps))
    survey = state.survey(steps)
    todo = [status for status in survey if status.state == "run"]
    if not todo:
        result = Result()
        tracker = Tracker(state, backends(project), say)
        for status in survey:
            assert status.output is not None and status.key is not None and status.parts is not None
            result.outputs[status.step.id] = status.output
            state.remember(status.step, status.parts)
            tracker.see(status.step, state.record(status.key))
        tracker.close()
        made = export(state, result)
        say(f"nothing to do: all {len(survey)} steps are cached ({seconds(time.monotonic() - begin)})")
    else:
        cost = total([estimate(state, status, survey) for status in todo])
        preflight(state, survey, int(cost.disk_bytes), options.budget)
        if not address:  # a cluster has other memory: there each training looks for itself
            require_memory(state, trainings(state, survey))
        result = _run(state, steps, Options(options.strict, options.budget, options.jobs), address)
        made = export(state, result)
        say(
            f"\n{len(result.ran)} steps run, {len(survey) - len(result.ran)} cached, {seconds(time.monotonic() - begin)}"
        )
    report = read_json(made["report.json"]) if "report.json" in made else None
    verdict = report["verdict"] if report else "passed"
    if options.json:
        print_json({
            "ran": result.ran, "outputs": result.outputs, "verdict": verdict if report else None,
            "headline": report["headline"] if report else None,
            "files": {name: str(path) for name, path in made.items()},
        })  # fmt: skip
    else:
        _print_end(report, made)
    return CODES[verdict]


def _run(state: State, steps: Sequence[Step], options: Options, address: str | None) -> Result:
    from slmops.cli.progress import Terminal
    from slmops.flow.executor import open_executor
    from slmops.flow.runner import run as run_plan
    from slmops.flow.tracking import Tracker, backends

    with Terminal(len(steps)) as terminal:
        executor = open_executor(state.root, address)
        tracker = Tracker(state, backends(state.project), terminal.line)
        try:
            result = run_plan(state, steps, executor, tracker.watch(terminal.watcher()), options)
        except BaseException:
            tracker.close(patience_s=3)
            raise
        for step in steps:
            tracker.see(step, result.records.get(step.id))
        tracker.close()
        return result


def _print_end(report: dict[str, Any] | None, made: dict[str, Path]) -> None:
    rows = []
    if report:
        from slmops.evaluate.text import render_text

        print(render_text(report))
        rows.append(["report", str(made["report.html"])])
    for name in ("bundle", "student", *(name for name in made if forms.of(name))):
        if name in made:
            held = size(sum(p.stat().st_size for p in made[name].rglob("*") if p.is_file()))
            rows.append([name, f"{made[name]} ({held})"])
    for name in (name.removesuffix(".json") for name in made if name.startswith("adapters") and name.endswith(".json")):
        rows += [[name, str(made[name])], *_adapter_rows(made[f"{name}.json"])]
    if rows:
        print("\n".join(columns(rows)))


def _adapter_rows(file: Path) -> list[list[str]]:
    """The first score of each adapter."""
    from slmops.evaluate.words import interval, shown, title
    from slmops.store.files import read_json

    rows = []
    for name, scores in (read_json(file) or {}).items():
        metric, score = next(iter(scores.items()))
        rows.append([f"  {name}", f"{title(metric)} {shown(metric, score['value'])} ({interval(metric, score)})"])
    return rows
