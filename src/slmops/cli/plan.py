"""`slmops plan`: the steps, which are cached, what the rest will cost."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from slmops.cli.common import json_argument, open_project, print_json, project_arguments, seconds, size
from slmops.core.layout import columns

if TYPE_CHECKING:
    from slmops.flow.estimate import Cost
    from slmops.flow.state import Status

HELP = "show the steps, which are cached, what is downloaded, estimated time, disk and memory"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `plan` takes."""
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help="plan only what these steps need (default: everything)"
    )
    project_arguments(parser)
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Print the plan; a training that does not fit into memory, or a file that cannot be so small, is an error after it."""
    from slmops.flow import file_size
    from slmops.flow.estimate import estimate, total, trainings
    from slmops.flow.memory import require
    from slmops.flow.runner import selected
    from slmops.flow.state import State

    project = open_project(options)
    state = State(project)
    survey = state.survey(selected(project.plan(), options.steps))
    costs = {status.step.id: estimate(state, status, survey) for status in survey}
    todo = [status for status in survey if status.state == "run"]
    cost = total([costs[status.step.id] for status in todo])
    if options.json:
        rows = [
            {
                "step": s.step.id, "method": s.step.method, "about": s.step.about, "state": s.state, "why": list(s.why),
                "output": s.output, "estimate": costs[s.step.id].to_json(),
            }
            for s in survey
        ]  # fmt: skip
        print_json({"name": project.spec.name, "steps": rows, "to_run": len(todo), "estimate": cost.to_json()})
    else:
        _print(survey, costs, cost)
    file_size.require(state, survey)
    require(state, trainings(state, survey))
    return 0


def _print(survey: Sequence[Status], costs: Mapping[str, Cost], cost: Cost) -> None:
    from slmops.flow.memory import PASSES

    todo = [status for status in survey if status.state == "run"]
    table = [["step", "", "time", "memory", "what"]]
    foreseen = {s.step.id for s in todo if s.step.params.get("training") is not None or s.step.method in PASSES}
    for status in survey:
        part = costs[status.step.id]
        time = "" if status.state == "cached" else (f"~{seconds(part.seconds)}" if part.seconds else "?")
        memory = f"~{size(part.memory_bytes)}" if status.step.id in foreseen else ""
        table.append([status.step.id, status.state, time, memory, status.step.about])
    print("\n".join(columns(table, right=(2, 3))))
    print()
    if not todo:
        print(f"nothing to do: all {len(survey)} steps are cached")
        return
    print(f"{len(todo)} of {len(survey)} steps to run")
    unknown = " and what depends on data that is not read yet" if cost.unknown else ""
    print(
        f"estimate: ~{seconds(cost.seconds)}{unknown}, disk ~{size(cost.disk_bytes)}, memory ~{size(cost.memory_bytes)}"
    )
    print(f"downloads: {', '.join(cost.downloads) or 'none'}")
    for name in cost.downloads:
        if name.startswith("hf:") and "@" not in name:
            print(f"note: {name} names no revision: what the hub has today is taken and kept; {name}@COMMIT pins it")
