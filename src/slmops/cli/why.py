"""`slmops why`: why a step would run again."""

from __future__ import annotations

import argparse

from slmops.cli.common import json_argument, open_project, print_json, project_arguments

HELP = "show why a step would run again: which part of its key changed"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `why` takes."""
    parser.add_argument(
        "step", nargs="?", metavar="STEP", help="a step of the plan (default: every step that would run)"
    )
    project_arguments(parser)
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Print the reasons; for a step that waits, also the reasons of what it waits for."""
    from slmops.flow.runner import selected
    from slmops.flow.state import State

    project = open_project(options)
    survey = State(project).survey(selected(project.plan(), [options.step] if options.step else []))
    stale = [status for status in survey if status.state == "run"]
    if options.json:
        print_json({status.step.id: list(status.why) for status in stale})
        return 0
    if not stale:
        print(f"{options.step or 'every step'} is cached: nothing that its result depends on has changed")
    for status in stale:
        print(status.step.id)
        for line in status.why:
            print(f"  {line}")
    return 0
