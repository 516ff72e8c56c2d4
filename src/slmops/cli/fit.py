"""`slmops fit`: the smallest form of the student that does its job within a budget."""

from __future__ import annotations

import argparse
import re
import shlex
import time
from typing import TYPE_CHECKING, Any, get_args

from slmops.cli.bench import positive
from slmops.cli.common import json_argument, open_project, print_json, project_arguments, say, seconds
from slmops.core.layout import columns
from slmops.core.words import Prefer
from slmops.errors import UsageError

if TYPE_CHECKING:
    from slmops.flow.fit import Fitted
    from slmops.flow.project import Project

HELP = "find the smallest form of the student that is good enough, fast enough and fits; judged on validation data"

EPILOG = """\
Candidates are the combinations of fit.vary in the project file (by default precisions and roundings), in the form that ships and in
each of fit.also. Quality is a share of the teacher's score, or of the student's in full precision where there is no local teacher.
Candidates are given up as soon as it is clear that they cannot do; everything is cached, so a killed fit goes on where it was.

  slmops fit --p95 400ms --min-quality 98%
  slmops fit --device pi5-8gb --max-ram 500M --max-size 5M --prefer fastest

exit codes: 0 one was chosen, 3 nothing fits"""

UNITS = {"": 1.0, "B": 1.0, "k": 1e3, "kB": 1e3, "M": 1e6, "MB": 1e6, "G": 1e9, "GB": 1e9}
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `fit` takes."""
    parser.add_argument(
        "--device", default="this", metavar="NAME",
        help="what it is for: this machine (this), or a profile such as pi5-8gb, whose times are predicted from those here",
    )  # fmt: skip
    parser.add_argument(
        "--max-ram", type=amount, metavar="SIZE", help="most memory of the whole process, such as 500M or 2G"
    )
    parser.add_argument("--max-size", type=amount, metavar="SIZE", help="largest model file")
    parser.add_argument("--p95", type=duration, metavar="TIME", help="95 %% of answers come within, such as 400ms")
    parser.add_argument(
        "--min-quality",
        type=share,
        default=0.98,
        metavar="SHARE",
        help="of the reference's score, such as 98%% or 0.98 (98%%)",
    )
    parser.add_argument("--prefer", choices=get_args(Prefer), default="smallest", help="of those that fit (smallest)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="with which candidates are timed (1)")
    parser.add_argument("--exhaustive", action="store_true", help="measure every candidate on all validation examples")
    project_arguments(parser)
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Choose, print the table and the reason, write the page."""
    from slmops.catalog.devices import find
    from slmops.cli.progress import Terminal
    from slmops.core.fit import Budget
    from slmops.evaluate.fit_page import render_fit
    from slmops.evaluate.fit_text import finding, fit_rows
    from slmops.flow.executor import open_executor
    from slmops.flow.fit import Display, fit
    from slmops.store.files import write_atomic

    begin = time.monotonic()
    device = find(options.device)
    if device is not None and device.gpu:
        raise UsageError(
            f"{device.title} is a GPU: times there do not follow from those of this machine's processor",
            "give the profile of a processor; `slmops catalog --fits` says which models a GPU's memory holds",
        )
    budget = Budget(options.max_size, options.max_ram, options.p95, options.min_quality)
    project = open_project(options)
    with Terminal(0) as terminal:
        display = Display(
            note=terminal.line, progress=terminal.progress,
            told=lambda row: terminal.line(f"  {row.name}: {finding(row.model_dump(mode='json'))}"),
        )  # fmt: skip
        found = fit(
            project, lambda: open_executor(project.state, None), budget, prefer=options.prefer, device=device,
            threads=options.threads, exhaustive=options.exhaustive, display=display,
        )  # fmt: skip
    summary = _summary(project, found, options)
    page = project.outputs / "fit.html"
    write_atomic(page, render_fit(summary).encode())
    say(f"\n{summary['measured_says']}, {seconds(time.monotonic() - begin)}")
    if options.json:
        print_json(summary | {"files": {"fit.html": str(page)}})
    else:
        possible = [row for row in summary["candidates"] if row["state"] != "impossible"]
        print("\n".join(columns(fit_rows(possible, found.front), right=range(2, 6))))
        if len(possible) < len(summary["candidates"]):
            print(f"({len(summary['candidates']) - len(possible)} combinations do not go together; --json says why)")
        print(f"\n{found.says}")
        print(found.basis)
        if found.chosen is not None:
            words = " ".join(f"--set {shlex.quote(text)}" for text in summary["set"])
            print(f"\nto run it:\n  slmops run {words}".rstrip())
        print(f"\npage: {page}")
    return 0 if found.chosen is not None else 3


def _summary(project: Project, found: Fitted, options: argparse.Namespace) -> dict[str, Any]:
    """What --json prints and the page shows."""
    from slmops.flow.fit_plan import value_at
    from slmops.flow.search_space import override

    rows = [row.model_dump(mode="json") for row in found.rows]
    possible = sum(row["state"] != "impossible" for row in rows)
    share = found.measured / (possible * found.examples)
    texts = [override(key, value) for key, value in found.values.items() if value != value_at(project.spec, key)]
    if found.form and found.form != "onnx":
        texts.append(override("convert.also", [found.form]))
    return {
        "name": project.spec.name, "device": options.device, "prefer": options.prefer,
        "budget": {"max_size": options.max_size, "max_ram": options.max_ram, "p95_s": options.p95, "min_quality": options.min_quality},
        "chosen": found.chosen, "nearest": found.near, "says": found.says, "basis": found.basis, "front": list(found.front),
        "reference": {"name": found.reference, "metric": found.metric, "score": found.reference_score, "examples": found.examples},
        "measured": {"answers": found.measured, "of": possible * found.examples, "share": share, "timed": found.timed,
                     "candidates": possible},
        "measured_says": f"{found.measured:,} of {possible * found.examples:,} answers asked ({100 * share:.0f} %), "
        f"{found.timed} of {possible} candidates timed",
        "set": texts if found.chosen is not None else [], "candidates": rows,
    }  # fmt: skip


def amount(text: str) -> float:
    """Bytes: `500M`, `2G`, `1.5MB`."""
    return _number(text, UNITS, "a size such as 500M or 2G")


def duration(text: str) -> float:
    """Seconds: `400ms`, `2s`."""
    return _number(text, TIMES, "a time such as 400ms or 2s")


def share(text: str) -> float:
    """A share: `98%` or `0.98`.

    Raises:
        ArgumentTypeError: it is none from 0 to 1.
    """
    value = _number(text, {"%": 0.01, "": 1.0}, "a share such as 98% or 0.98")
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is more than everything: give a share such as 98% or 0.98")
    return value


def _number(text: str, units: dict[str, float], wanted: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z%]*)\s*", text)
    unit = units.get(match.group(2)) if match else None
    if match is None or unit is None or not float(match.group(1)) * unit > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return float(match.group(1)) * unit
