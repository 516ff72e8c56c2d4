"""`slmops search`: try parameters, judge trials on validation data, say which did best and what mattered."""

from __future__ import annotations

import argparse
import shlex
import time
from typing import TYPE_CHECKING, Any

from slmops.cli.common import json_argument, on_argument, open_project, print_json, project_arguments, say, seconds
from slmops.core.layout import columns
from slmops.errors import UsageError

if TYPE_CHECKING:
    from slmops.core.search import Trial
    from slmops.flow.project import Project
    from slmops.flow.search import Found

HELP = (
    "try the parameters of the file's search section, judged on validation data; a killed search goes on where it was"
)

ROWS = 60
"""Trials in the table; of more the last ones. All of them are on the page and in --json."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `search` takes."""
    project_arguments(parser)
    parser.add_argument(
        "--trials", type=int, metavar="N", help="trials in all, those of earlier runs included (default: search.trials)"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="trials chosen and run beside each other (default: search.parallel)"
    )
    on_argument(parser)
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Search, then print the trials and the best of them."""
    from slmops.cli.progress import Terminal
    from slmops.evaluate.search_page import render_search
    from slmops.flow.executor import open_executor
    from slmops.flow.ray_executor import check_on
    from slmops.flow.search import Display, search
    from slmops.store.files import write_atomic

    begin = time.monotonic()
    for name in ("trials", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1", f"leave it out for what search.{_KEYS[name]} says")
    address = check_on(options.on)
    project = open_project(options)
    with Terminal(0) as terminal:
        display = Display(
            began=lambda study, ended, total: terminal.line(_began(study, ended, total)),
            progress=terminal.progress,
            told=lambda trial: terminal.line(_line(project, trial)),
        )
        found = search(
            project, lambda: open_executor(project.state, address),
            trials=options.trials, parallel=options.jobs, display=display,
        )  # fmt: skip
    summary = _summary(project, found)
    page = project.outputs / "search.html"
    write_atomic(page, render_search(summary).encode())
    say(f"\n{len(found.trials)} trials, {seconds(time.monotonic() - begin)}")
    if options.json:
        print_json(summary | {"files": {"search.html": str(page)}})
    else:
        _print(found, summary)
        print(f"page: {page}")
    return 0


_KEYS = {"trials": "trials", "jobs": "parallel"}


def _began(study: str, ended: int, total: int) -> str:
    left = max(0, total - ended)
    return f"search {study}: {f'{ended} trials have ended, ' if ended else ''}{left or 'none'} to go"


def _line(project: Project, trial: Trial) -> str:
    from slmops.evaluate.search_page import number
    from slmops.flow.search_plan import objectives_of

    what: str = trial.state
    if trial.values is not None:
        metrics = [objective.metric for objective in objectives_of(project.spec)]
        what = ", ".join(f"{m} {number(v, m)}" for m, v in zip(metrics, trial.values, strict=True))
    elif trial.state == "pruned":
        what = f"given up after {len(trial.curve)} looks"
    elif trial.why:
        what = f"failed: {' '.join(trial.why.split())}"
    return f"trial {trial.number}: {what}  ({', '.join(f'{k}={_short(v)}' for k, v in trial.parameters.items())})"


def _short(value: Any) -> str:
    from slmops.flow.search_space import shown

    text = f"{value:.4g}" if isinstance(value, float) else shown(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _summary(project: Project, found: Found) -> dict[str, Any]:
    """What --json prints and the page shows."""
    from slmops.flow.search import overrides

    numbers = [trial.number for trial in found.best]
    return {
        "name": project.spec.name,
        "study": found.study,
        "objectives": [{"metric": m, "direction": w} for m, w in zip(found.metrics, found.ways, strict=True)],
        "parameters": {
            d.key: {
                "log": d.range.log, "numbers": d.kind != "choice",
                "choices": list(d.range.choices) if d.range.choices is not None else None,
            }
            for d in found.space
        },
        "trials": [
            {
                "number": t.number, "state": t.state, "parameters": dict(t.parameters),
                "values": list(t.values) if t.values is not None else None, "curve": list(t.curve), "why": t.why,
            }
            for t in found.trials
        ],
        "best": numbers[0] if len(found.metrics) == 1 and numbers else None,
        "front": numbers,
        "set": {str(trial.number): overrides(project, trial) for trial in found.best},
        "importance": dict(found.importance),
        "no_pruning": found.pruning,
    }  # fmt: skip


def _print(found: Found, summary: dict[str, Any]) -> None:
    from slmops.evaluate.search_page import number

    keys = [dimension.key for dimension in found.space]
    best = {trial.number for trial in found.best}
    rows = [["", "trial", *keys, *found.metrics, "state"]]
    for trial in found.trials[-ROWS:]:
        values = [number(v, m) for v, m in zip(trial.values or [None] * len(found.metrics), found.metrics, strict=True)]
        given = [_short(trial.parameters[key]) if key in trial.parameters else "–" for key in keys]
        rows.append(["*" if trial.number in best else "", str(trial.number), *given, *values, trial.state])
    print("\n".join(columns(rows, right=(1, *range(2, 2 + len(keys) + len(found.metrics))))))
    if len(found.trials) > ROWS:
        print(f"({len(found.trials) - ROWS} trials before these are on the page)")
    if summary["no_pruning"]:
        print(f"\nno training was ended early: {summary['no_pruning']}")
    if found.importance:
        print("\nwhat mattered:")
        print(
            "\n".join(columns([[f"  {key}", f"{100 * share:.0f} %"] for key, share in found.importance.items()], (1,)))
        )
    if not found.best:
        print("\nno trial is complete")
    elif len(found.metrics) == 1:
        print(f"\nthe best is trial {found.best[0].number}; to run it:")
    else:
        print(f"\n{len(found.best)} trials that none beats in everything; to run one of them:")
    for trial in found.best:
        words = " ".join(f"--set {shlex.quote(text)}" for text in summary["set"][str(trial.number)])
        print(f"  slmops run {words}")
    print()
